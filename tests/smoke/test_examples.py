"""Everything public has an example; pytest runs the examples themselves, as doctests."""

import pytest

import kvjax
from kvjax import methods, sparsity

MADE_BY_OTHERS = {"Completion", "Model"}  # by `generate` and `load`, whose examples show them
DOCUMENTED = {name: getattr(kvjax, name) for name in set(kvjax.__all__) - MADE_BY_OTHERS}
DOCUMENTED["METHODS"], DOCUMENTED["SPARSITIES"] = methods, sparsity  # a dict has no docstring of its own
DOCUMENTED["Model.logits"] = kvjax.Model.logits


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_public_names_have_a_runnable_example(name):
    assert ">>>" in DOCUMENTED[name].__doc__
