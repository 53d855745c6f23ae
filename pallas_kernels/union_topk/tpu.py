"""The union of a group's top-k in Pallas Mosaic."""

__all__ = ["run"]


def run(scores, *, k: int, limit: int):
    """Not written yet."""
    raise NotImplementedError("not yet")
