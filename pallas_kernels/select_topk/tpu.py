"""Top-k selection in Pallas Mosaic."""

__all__ = ["run"]


def run(scores, *, k: int):
    """Not written yet."""
    raise NotImplementedError("not yet")
