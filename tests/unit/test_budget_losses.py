"""Budgets follow what slots are worth, and are judged on states that Chelsea makes."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from method_cases import MODELS, PROMPTS, settings

import kvjax
from kvjax import budget_losses, budgets, cache
from kvjax.budgets import Shares
from kvjax.methods import make
from kvjax.methods.chelsea import Chelsea

MODEL = MODELS["G2"]
CHELSEA = make("chelsea", **settings("chelsea"))
DOCUMENTS = np.random.default_rng(1).integers(0, 97, (2, 160)).astype(np.int32)
EVEN = Shares(((1.0, 1.0), (1.0, 1.0)), "", 0.5, 128)
N_REST = 32


def test_states_are_judged_that_chelsea_makes():
    table = np.array([[30, 48], [64, 40]])
    method = dataclasses.replace(CHELSEA, budget=table)
    ends = budget_losses._Ends.of(MODEL, PROMPTS, 8, method.matching)
    judged = ends.clustered(table - method.n_free)
    _, served = kvjax.prefill(MODEL, PROMPTS[:, :-8], method, room=8)
    for ours, theirs in zip(judged, served, strict=True):
        count = np.asarray(cache.count(ours))
        np.testing.assert_array_equal(count, cache.count(theirs))
        firsts = zip(cache.starts(ours.slots), cache.starts(theirs.slots), strict=True)
        for (head, (a, b)), row in itertools.product(enumerate(firsts), range(len(count))):
            n = count[row, head]
            for leaf in ("mass", "pos", "k", "v"):
                x, y = (
                    np.asarray(getattr(kv, leaf))[row, at : at + n] for kv, at in ((ours, a), (theirs, b))
                )
                np.testing.assert_allclose(x, y, atol=1e-5)


def test_the_loss_is_that_of_the_full_cache_beside_the_clustered_one():
    ends = budget_losses._Ends.of(MODEL, DOCUMENTS, N_REST, CHELSEA.matching)
    few, many = (ends.loss(ends.clustered(np.full((2, 2), n))) for n in (32, 100))
    assert ends.loss(ends.state) == 0 < many < few
    less = ends.with_less(ends.clustered(np.full((2, 2), 100)), np.full((2, 2), 100), 1, 0)
    assert np.asarray(cache.count(less[1])).tolist() == [[75, 100]] * 2
    assert np.asarray(cache.count(less[0])).tolist() == [[100, 100]] * 2


def test_refined_budgets_lose_no_more_than_those_they_begin_with():
    found = budget_losses.refine(MODEL, DOCUMENTS, EVEN, 2, CHELSEA, n_rest=N_REST)
    assert len(found.losses) == 3
    assert dataclasses.replace(found, shares=EVEN.shares, losses=()) == EVEN
    ends = budget_losses._Ends.of(MODEL, DOCUMENTS, N_REST, CHELSEA.matching)
    table = np.array(found.table(64, CHELSEA.least))
    assert ends.loss(ends.clustered(table)) == pytest.approx(min(found.losses), abs=1e-5)
    assert min(found.losses) < found.losses[0]


def test_layers_with_a_window_have_no_share(tmp_path):
    model = MODELS["G1 with a window"]
    pooled = budgets.calibrate(model, DOCUMENTS[:, :-N_REST], 0.5, CHELSEA)
    found = budget_losses.refine(model, DOCUMENTS, pooled, 1, CHELSEA, n_rest=N_REST)
    assert found.shares[0] == (0.0, 0.0)
    assert np.mean(found.shares[1]) == pytest.approx(1, abs=1e-3)
    budgets.save(found, tmp_path / "shares.json")
    assert budgets.load(tmp_path / "shares.json", model) == found


rises = st.lists(st.floats(-1e-3, 1e-2), min_size=6, max_size=6)


@given(rises.filter(lambda x: max(x) > 1e-6), st.sampled_from([0.5, 0.25]))
def test_slots_move_to_where_they_are_worth_more(rise, power):
    table, rise = np.full((3, 2), 64), np.reshape(rise, (3, 2))
    moved = np.array(budget_losses._moved(table, rise, power))
    assert moved.mean() == pytest.approx(1, abs=1e-3)
    assert moved.max() <= 4.01 * moved.min()
    order = np.argsort(rise.ravel(), kind="stable")
    assert (np.diff(moved.ravel()[order]) >= -1e-4).all()


def test_slots_of_equal_worth_stay():
    table = np.array([[32, 64], [96, 128]])
    moved = np.array(budget_losses._moved(table, table * 1e-4, 0.5))
    np.testing.assert_allclose(moved, table / table.mean(), atol=1e-3)


@pytest.mark.parametrize(("n_rounds", "n_rest"), [(0, 32), (1, 0), (1, 160)])
def test_nothing_to_refine_by_raises(n_rounds, n_rest):
    with pytest.raises(ValueError, match="refinement takes 1 round or more, and documents with an end"):
        budget_losses.refine(MODEL, DOCUMENTS, EVEN, n_rounds, Chelsea(64), n_rest=n_rest)
