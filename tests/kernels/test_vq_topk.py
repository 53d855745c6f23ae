"""Slots chosen by their codes: against loops over sets, cut into parts, and what is refused."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import tuning
from pallas_kernels.backend import Target, aim, checked
from pallas_kernels.vq_topk import gpu, histogram, marked, vq_topk

SMALL = gpu.Settings(programs=40, block=16)  # several parts of several steps
ONE = gpu.Settings(programs=1, block=16)  # one part
PLATFORMS = ("cpu", "gpu", "tpu")


def inputs(batch, heads, group, n_codes, slots, few=0):
    """Products are whole numbers, and so exact and often equal."""
    rng = np.random.default_rng(slots)
    q, codebook = rng.integers(-2, 3, (batch, heads, group, 4)), rng.integers(-2, 3, (heads, n_codes, 4))
    codes = rng.integers(-1, few or n_codes, (batch, heads, slots))
    codes = np.where((rng.random(codes.shape) < 0.1) & (codes >= 0), -2 - codes, codes)
    return jnp.asarray(q, jnp.float32), jnp.asarray(codebook, jnp.float32), jnp.asarray(codes, jnp.int16)


def choose(platform, q, codebook, codes, n, k=None, n_always=None, how=SMALL):
    n = jnp.asarray(n, jnp.int32)
    options = {"k": k or int(n.max()), "n_always": codes.shape[2] if n_always is None else n_always}
    impl = "reference" if platform == "cpu" else platform
    with aim(Target(platform, "interpreted", "forward")), tuning.force("vq_topk", how):
        counts = histogram(codes, codebook.shape[1])
        return np.asarray(vq_topk(q, codebook, codes, counts, n, **options, impl=impl))


def wanted(q, codebook, codes, n) -> list[list[list[int]]]:
    """The choice of every row and KV head, from sets."""
    q, codebook, codes = (np.asarray(x, np.float64) for x in (q, codebook, codes))
    rows = []
    for row, (per_head, count) in enumerate(zip(codes, n, strict=True)):
        heads = []
        for head, own in enumerate(per_head):
            taken = set(np.flatnonzero(own < -1).tolist())
            ranked = np.flatnonzero(own >= 0)
            for query in q[row, head]:
                score = codebook[head, own[ranked].astype(int)] @ query
                taken |= set(ranked[np.argsort(-score, kind="stable")[:count]].tolist())
            heads.append(sorted(taken))
        rows.append(heads)
    return rows


@settings(max_examples=8, deadline=None)  # every shape compiles anew
@given(*(st.integers(1, most) for most in (3, 3, 4, 9, 90)), st.lists(st.integers(1, 90), min_size=3))
def test_reference_chooses_as_sets_do(batch, heads, group, n_codes, slots, n):
    q, codebook, codes = inputs(batch, heads, group, n_codes, slots)
    n = [min(x, slots) for x in n[:batch]]
    out = choose("cpu", q, codebook, codes, n)
    expected = wanted(q, codebook, codes, n)
    assert [[[i for i in x if i >= 0] for x in row] for row in out.tolist()] == expected
    assert all((np.diff(x < 0) >= 0).all() for row in out for x in row)  # -1 at the end alone


@pytest.mark.parametrize(("platform", "how"), [("gpu", SMALL), ("gpu", ONE), ("tpu", None)])
@pytest.mark.parametrize("few", [0, 1, 3])
def test_kernels_cut_thresholds_anywhere(platform, how, few):
    """Few codewords hold all slots, so that thresholds cut through them, in any part."""
    q, codebook, codes = inputs(2, 2, 3, 30, 500, few)
    for n in ([1, 500], [63, 64], [200, 333]):
        out = choose(platform, q, codebook, codes, n, how=how)
        found = [[[i for i in x if i >= 0] for x in row] for row in out.tolist()]
        assert found == wanted(q, codebook, codes, n)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_nothing_to_rank_gives_what_is_marked(platform):
    q, codebook, _ = inputs(1, 1, 2, 5, 60)
    codes = jnp.full((1, 1, 60), -1, jnp.int16).at[0, 0, jnp.array([7, 40])].set(marked(3))
    assert choose(platform, q, codebook, codes, [4], n_always=3).tolist() == [[[7, 40, *[-1] * 9]]]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_nan_harms_only_its_row(platform):
    q, codebook, codes = inputs(2, 1, 2, 9, 80)
    whole = choose(platform, q, codebook, codes, [5, 5])
    broken = choose(platform, q.at[0].set(jnp.nan), codebook, codes, [5, 5])
    np.testing.assert_array_equal(broken[1], whole[1])
    assert broken.min() >= -1
    assert broken.max() < 80


def test_marks_are_undone_by_marking_again():
    codes = jnp.arange(-1, 2**15 - 2, dtype=jnp.int16)
    assert (marked(codes)[1:] < -1).all()
    assert marked(codes)[0] == -1
    np.testing.assert_array_equal(marked(marked(codes)), codes)


def test_what_is_refused():
    plain = inspect.unwrap(vq_topk)  # before the test run's check of annotations, which sees shapes first
    q, codebook, codes = inputs(1, 2, 2, 5, 20)
    args = (q, codebook, codes, histogram(codes, 5), jnp.array([3]))
    with pytest.raises(ValueError, match="with the same K and D"):
        plain(q, codebook[:1], *args[2:], k=3)
    with pytest.raises(ValueError, match="there are codes"):
        plain(*args[:3], args[3][..., :4], args[4], k=3)
    with pytest.raises(TypeError, match="codes are int16"):
        vq_topk(q, codebook, codes.astype(jnp.int32), *args[3:], k=3)
    for options in ({"k": 0}, {"k": 21}, {"k": 3, "n_always": 21}):
        with pytest.raises(ValueError, match="a head chooses 1 to S slots"):
            vq_topk(*args, **options)
    with pytest.raises(ValueError, match="has 1 to 32,766"):
        vq_topk(q, jnp.zeros((2, 2**15 - 1, 4)), codes, jnp.zeros((1, 2, 2**15 - 1), jnp.int32), args[4], k=3)
    with pytest.raises(NotImplementedError, match="use impl='reference'"):
        vq_topk(*args, k=3, impl="tpu")


def test_kernels_refuse_large_groups():
    q, codebook, codes = inputs(1, 1, 31, 5, 20)
    with pytest.raises(NotImplementedError, match="the kernel takes up to 30 query heads"):
        choose("gpu", q, codebook, codes, [3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": 9}, "below the number of codewords"),
        ({"counts": 9}, "counts are not those"),
        ({"n": 9}, "at most k"),
        ({"n_always": 0}, "more slots are marked"),
    ],
)
def test_wrong_values_are_errors_in_debug_mode(change, message):
    q, codebook, codes = inputs(1, 1, 2, 5, 20)
    codes = codes.at[0, 0, 0].set(change.get("codes", -2))
    counts = histogram(codes, 5).at[0, 0, 0].add(change.get("counts", 0))
    args = (q, codebook, codes, counts, jnp.array([change.get("n", 3)]))
    with pytest.raises(ValueError, match=message):
        checked(lambda *args: vq_topk(*args, k=3, n_always=change.get("n_always", 20)))(*args)
