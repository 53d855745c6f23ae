"""Calibrates what A²ATS knows of a model: the codebooks of its keys (`a2ats.calibrate`)."""
