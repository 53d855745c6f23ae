"""Runs the laws case by case, so that a case's programs are compiled once for all of them."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Brings the laws of one method and one model together; the sort is stable."""
    here = [i for i, item in enumerate(items) if item.path.name == "test_methods.py"]
    ordered = sorted((items[i] for i in here), key=_case)
    for i, item in zip(here, ordered, strict=True):
        items[i] = item


def _case(item) -> tuple[str, str]:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return str(params.get("name", "")), str(params.get("model_name", "G2"))
