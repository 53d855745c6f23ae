"""Experiments: what produces the figures, and the results files that hold them."""
