"""Marks what compiles interpreted kernels for minutes, so that it need not run on every Python."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents and item.path.name not in ("test_compile.py", "test_tuning.py"):
            item.add_marker(pytest.mark.interpreted)
