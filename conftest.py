"""Lets all examples in docstrings share one model, though each of them loads it for the reader."""

import functools

import pytest


@functools.cache
def load_once(*args, **kwargs):
    """Loads a model, as `kvjax.load`, the first time it is asked for."""
    from kvjax.model import load

    return load(*args, **kwargs)


@pytest.fixture(autouse=True)
def share_models_of_examples(request, monkeypatch):
    """Gives examples `load_once` in place of `kvjax.load`."""
    if isinstance(request.node, pytest.DoctestItem):
        import kvjax

        monkeypatch.setattr(kvjax, "load", load_once)
