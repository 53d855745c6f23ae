"""Sampling: limits hold for any logits, and greedy is the argmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.sampling import Sampling, sample

draw = jax.jit(jax.vmap(sample, in_axes=(None, None, 0)))


def draws(logits, sampling, n=200):
    """Tokens that n steps draw from one row."""
    return np.asarray(draw(jnp.asarray(logits, jnp.float32)[None], sampling.limits(), jnp.arange(n)))[:, 0]


@given(st.integers(0, 1000), st.integers(1, 8))
def test_top_k_draws_from_the_k_likeliest(seed, k):
    logits = np.random.default_rng(seed).normal(size=31) * 2
    allowed = np.argsort(-logits)[:k]
    assert np.isin(draws(logits, Sampling(temperature=1.0, top_k=k)), allowed).all()


@given(st.integers(0, 1000), st.floats(0.05, 1.0))
def test_top_p_draws_from_the_smallest_set_that_reaches_p(seed, top_p):
    logits = np.random.default_rng(seed).normal(size=31) * 2
    order = np.argsort(-logits)
    p = np.exp(logits[order] - logits.max())
    p /= p.sum()
    before = np.cumsum(p) - p
    allowed = order[before < top_p + 1e-5]
    assert np.isin(draws(logits, Sampling(temperature=1.0, top_p=top_p)), allowed).all()


@given(st.integers(0, 1000), st.floats(0.05, 1.0))
def test_min_p_draws_what_is_likely_enough(seed, min_p):
    logits = np.random.default_rng(seed).normal(size=31) * 2
    allowed = np.flatnonzero(np.exp(logits - logits.max()) >= min_p - 1e-5)
    assert np.isin(draws(logits, Sampling(temperature=1.0, min_p=min_p)), allowed).all()


def test_greedy_is_the_argmax_and_temperature_follows_the_softmax():
    logits = np.array([0.0, 1.0, 2.0, -1.0])
    assert (draws(logits, Sampling()) == 2).all()
    counts = np.bincount(draws(logits, Sampling(temperature=0.7), 20000), minlength=4) / 20000
    p = np.exp(logits / 0.7)
    np.testing.assert_allclose(counts, p / p.sum(), atol=0.015)


def test_a_seed_repeats_and_another_differs():
    logits = np.zeros(50)
    first = draws(logits, Sampling(temperature=1.0, seed=1))
    assert (first == draws(logits, Sampling(temperature=1.0, seed=1))).all()
    assert (first != draws(logits, Sampling(temperature=1.0, seed=2))).any()


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 2}, "min_p"),
    ],
)
def test_settings_out_of_range_raise(bad, rule):
    with pytest.raises(ValueError, match=rule):
        Sampling(**bad)
