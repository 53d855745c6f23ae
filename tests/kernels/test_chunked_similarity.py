"""Chunked similarity: the reference against loops in float64, its special cases, its measure of error."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import Target, aim, checked
from pallas_kernels.chunked_similarity import chunked_similarity
from pallas_kernels.chunked_similarity.specs import error

KINDS = ("cosine", "dot", "l2")
TARGETS = {
    "reference": Target("cpu", "x"),
    "gpu": Target("gpu", "x", "forward"),
    "tpu": Target("tpu", "x", "forward"),
}


def score(a, b, kind):
    if kind == "l2":
        return -np.sum((a - b) ** 2)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b if kind == "dot" else (a @ b / norms if norms else 0.0)


def loops(k, mass, slots, chunk, stride, kind):
    """Matches by the definition, slot by slot."""
    best, value = np.full(mass.shape, -1), np.full(mass.shape, -np.inf)
    for b in range(len(k)):
        first = 0
        for size in slots:
            for s in range(size):
                start = s - s % chunk
                if mass[b, first + s] == 0 or (s - start) % stride == stride - 1:
                    continue
                for t in range(start + stride - 1, min(start + chunk, size), stride):
                    if mass[b, first + t] > 0:
                        x = score(k[b, first + s], k[b, first + t], kind)
                        if x > value[b, first + s]:
                            best[b, first + s], value[b, first + s] = t, x
            first += size
    return best, value


@settings(max_examples=8)
@given(
    st.lists(st.integers(1, 14), min_size=1, max_size=3),
    st.integers(2, 4), st.integers(0, 8), st.sampled_from(KINDS), st.integers(0, 2**16),
)  # fmt: skip
def test_reference_is_the_definition(slots, stride, more, kind, seed):
    rng = np.random.default_rng(seed)
    k = rng.normal(size=(2, sum(slots), 4)).astype(np.float32)
    mass = rng.integers(0, 3, k.shape[:2]).astype(np.float32)
    expected = loops(k.astype(np.float64), mass, slots, stride + more, stride, kind)
    k[mass == 0] = np.nan
    options = {"slots": tuple(slots), "chunk": stride + more, "stride": stride, "kind": kind}
    out = jax.jit(lambda k, mass: chunked_similarity(k, mass, **options, impl="reference"))(k, mass)
    np.testing.assert_array_equal(out[0], expected[0])
    np.testing.assert_allclose(out[1], expected[1], rtol=1e-4, atol=1e-5)
    assert error(out, expected, {"k": k, "mass": mass, **options}) < 1e-5


def test_one_chunk_is_token_merging():
    k = np.asarray(jax.random.normal(jax.random.key(0), (1, 30, 8)))
    metric = k[0] / np.linalg.norm(k[0], axis=-1, keepdims=True)
    scores = metric[::2] @ metric[1::2].T  # as bipartite_soft_matching in the paper's appendix
    best, value = chunked_similarity(jnp.asarray(k), jnp.ones((1, 30)), slots=(30,), chunk=30)
    np.testing.assert_array_equal(best[0, ::2], 2 * scores.argmax(-1) + 1)
    np.testing.assert_allclose(value[0, ::2], scores.max(-1), rtol=1e-5)
    assert np.all(best[0, 1::2] == -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", TARGETS)
def test_ties_go_to_the_earliest_destination(at, kind):
    k, mass = jnp.ones((1, 40, 16)), jnp.ones((1, 40)).at[0, 1].set(0)
    with aim(TARGETS[at]):
        best, _ = chunked_similarity(k, mass, slots=(40,), chunk=32, kind=kind, impl=at)
    np.testing.assert_array_equal(best[0], [*[3, -1] * 16, *[33, -1] * 4])


@pytest.mark.parametrize("at", TARGETS)
def test_keys_of_zeros_have_a_cosine_of_0(at):
    with aim(TARGETS[at]):
        best, value = chunked_similarity(
            jnp.zeros((1, 16, 16)), jnp.ones((1, 16)), slots=(16,), chunk=16, impl=at
        )
    np.testing.assert_array_equal(best[0, ::2], 1)
    np.testing.assert_array_equal(value[0, ::2], 0)


@pytest.mark.parametrize("name", TARGETS)
def test_slots_that_are_fewer_than_a_stride_match_nothing(name):
    k = jax.random.normal(jax.random.key(3), (1, 16, 16))
    with aim(TARGETS[name]):
        best, _ = chunked_similarity(k, jnp.ones((1, 16)), slots=(16,), chunk=32, stride=32)
    assert (best == -1).all()


def test_small_heads_at_the_end_share_one_read_on_tpu():
    """Chunks of 32 that begin fewer than 32 rows before the end of the array."""
    k = jax.random.normal(jax.random.key(3), (1, 96, 16))
    options = {"slots": (48, 16, 16, 16), "chunk": 32}
    expected = jax.jit(lambda k: chunked_similarity(k, jnp.ones((1, 96)), **options, impl="reference"))(k)
    with aim(TARGETS["tpu"]):
        best, value = chunked_similarity(k, jnp.ones((1, 96)), **options, impl="tpu")
    np.testing.assert_array_equal(best, expected[0])
    np.testing.assert_allclose(value, expected[1], rtol=1e-5)


def test_the_error_takes_any_of_equal_destinations_and_no_wrong_one():
    k = jnp.asarray([[[1.0, 0], [1, 0], [0, 1], [1, 0.001], [1, 0], [2, 0]]])
    options = {"slots": (6,), "chunk": 4, "stride": 2, "kind": "cosine"}
    best, value = (np.array(x) for x in chunked_similarity(k, jnp.ones((1, 6)), **options))
    assert best.tolist() == [[1, -1, 3, -1, 5, -1]]
    inputs = {"k": k, "mass": jnp.ones((1, 6)), **options}

    def changed(slot, to=None, similarity=None):
        new = best.copy(), value.copy()
        if to is not None:
            new[0][0, slot] = to
        if similarity is not None:
            new[1][0, slot] = similarity
        return error(new, (best, value), inputs)

    assert changed(0, 3) < 1e-5  # nearly as similar
    assert changed(2, 1) > 1e-4  # less similar
    assert changed(0, similarity=0.9) > 0.05
    assert changed(0, 5) == math.inf  # another chunk
    assert changed(0, 2) == math.inf  # no destination
    assert changed(0, -1) == math.inf
    assert changed(1, similarity=0.0) == math.inf  # a destination has none
    assert changed(0, similarity=np.nan) == math.inf
    dead = inputs | {"mass": jnp.ones((1, 6)).at[0, 3].set(0)}
    assert error((np.where(best == 1, 3, best), value), (best, value), dead) == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cos"}, "kind is one of cosine, dot, l2, got kind='cos'"),
        ({"stride": 1}, "2 <= stride <= chunk, got stride=1"),
        ({"chunk": 2, "stride": 3}, "2 <= stride <= chunk, got stride=3, chunk=2"),
        ({"slots": (8, 4)}, "k has a row per slot of each head"),
        ({"mass": jnp.ones((1, 8))}, "there is one mass per slot"),
    ],
)
def test_refuses(change, message):
    args = {"k": jnp.ones((1, 16, 4)), "mass": jnp.ones((1, 16)), "slots": (8, 8), "chunk": 4} | change
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(chunked_similarity)(**args)  # else the test run's annotations see shapes first


def test_debug_mode_refuses_a_negative_mass():
    def call(mass):
        return chunked_similarity(jnp.ones((1, 4, 2)), mass, slots=(4,), chunk=2)

    with pytest.raises(ValueError, match="not negative and not NaN"):
        checked(call)(jnp.full((1, 4), -1.0))


@pytest.mark.parametrize(
    ("platform", "dtype", "size", "message"),
    [
        ("gpu", jnp.float8_e4m3fn, 64, "takes float32"),
        ("tpu", jnp.float8_e4m3fn, 64, "takes float32"),
        ("gpu", jnp.bfloat16, 512, "takes head sizes up to 256, got D=512"),
        ("tpu", jnp.float32, 512, "takes chunks of up to 4194304 bytes, got .*: lower chunk=4096"),
    ],
)
def test_kernels_refuse(platform, dtype, size, message):
    shapes = jax.ShapeDtypeStruct((1, 4096, size), dtype), jax.ShapeDtypeStruct((1, 4096), jnp.float32)
    options = {"slots": (4096,), "chunk": 4096, "impl": platform}
    with aim(TARGETS[platform]), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda k, m: chunked_similarity(k, m, **options), *shapes)
