"""Selection of the k largest, per row and united over a group: definitions, hard rows and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import tuning
from pallas_kernels.backend import Target, aim, checked
from pallas_kernels.select_topk import gpu, select_topk
from pallas_kernels.union_topk import union_topk

SMALL = gpu.Settings(sample=64, block=64, parts=4, width=16)  # so that short rows take every step
FLOATS = st.one_of(
    st.sampled_from([-np.inf, np.inf, -0.0, 0.0, 1.0, 1.5, 1e-40, -1e-40]),
    st.floats(-4, 4, width=32),
)


def order(row):
    """Indices above -inf, largest first, of equals the first; -0.0 is below 0.0."""
    alive = [i for i, x in enumerate(row) if x > -np.inf]
    return sorted(alive, key=lambda i: (-row[i], np.signbit(row[i]), i))


def pad(chosen, n):
    return sorted(chosen) + [-1] * (n - len(chosen))


def select(row, k):
    return pad(order(row)[:k], k)


def unite(rows, k, limit):
    members = set().union(*(order(row)[:k] for row in rows))
    rank = [x if i in members else -np.inf for i, x in enumerate(rows.max(axis=0))]
    return pad(order(rank)[:limit], limit)


def rows_of(shape):
    return hnp.arrays(np.float32, shape, elements=FLOATS)


@given(scores=rows_of((3, 9)), k=st.integers(1, 9))
def test_reference_is_the_definition(scores, k):
    out = select_topk(jnp.asarray(scores), k, impl="reference")
    assert out.dtype == jnp.int32
    assert out.tolist() == [select(row, k) for row in scores]


@given(scores=rows_of((2, 1, 3, 9)), k=st.integers(1, 9), data=st.data())
def test_union_reference_is_the_definition(scores, k, data):
    # A maximum does not tell -0.0 from 0.0, nor (a CPU's) subnormal numbers from zeros.
    scores = np.where(np.abs(scores) < np.finfo(np.float32).tiny, np.float32(0), scores)
    limit = data.draw(st.none() | st.integers(1, 9))
    out = union_topk(jnp.asarray(scores), k, limit=limit, impl="reference")
    assert out[:, 0].tolist() == [unite(rows[0], k, limit or min(9, 3 * k)) for rows in scores]


def hard_rows(n):
    """Rows that break a selection which trusts its sample, its bits or its room."""
    rng, i = np.random.default_rng(0), np.arange(n)
    normal = rng.normal(size=(2, n))
    return np.stack(
        [
            np.full(n, 2.5),
            np.full(n, -np.inf),
            np.where(i % 7 == 3, 1.0, 0.0),
            np.where(i % 2 == 1, 0.0, -0.0),
            np.where(i % 50 == 3, normal[0], -np.inf),  # fewer than k are alive
            np.where(i == n - 1, 0.0, -np.inf),
            i,
            -i,
            np.where(i // 60 == 7, 10, 0) + normal[0],  # the largest lie together
            np.where(i // 60 == 7, 10, 10 * normal[1] - 100),
            np.where(i % 9 == 0, np.inf, normal[1]),
            rng.integers(-3, 4, n) * 1e-40,
            np.exp(25 * normal[0]) * np.sign(normal[1]),  # of every magnitude
            np.full(n, np.finfo(np.float32).min),
        ]
    ).astype(np.float32)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("k", [1, 100])
def test_kernel_chooses_right_from_hard_rows(platform, k):
    scores = hard_rows(700)
    with aim(Target(platform, "interpreted", "forward")), tuning.force("select_topk", SMALL):
        out = select_topk(jnp.asarray(scores), k, impl=platform)
    assert out.tolist() == [select(row, k) for row in scores]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_kernel_unites_hard_rows(platform):
    scores = hard_rows(700)[:12].reshape(3, 2, 2, 700) + np.float32(0)
    with aim(Target(platform, "interpreted", "forward")), tuning.force("select_topk", SMALL):
        out = union_topk(jnp.asarray(scores), 100, limit=130, impl=platform)
    assert out.tolist() == [[unite(rows, 100, 130) for rows in part] for part in scores]


@pytest.fixture(scope="module", params=["gpu", "tpu"])
def compiled(request):
    """Each kernel once, for rows that hypothesis draws."""
    with aim(Target(request.param, "interpreted", "forward")), tuning.force("select_topk", SMALL):
        run = jax.jit(lambda scores: select_topk(scores, 20, impl=request.param))
        return run.lower(jax.ShapeDtypeStruct((2, 150), jnp.float32)).compile()


@settings(max_examples=30)
@given(scores=rows_of((2, 150)))
def test_kernel_is_the_definition(compiled, scores):
    assert compiled(jnp.asarray(scores)).tolist() == [select(row, 20) for row in scores]


@pytest.mark.parametrize("passing", [0, 19])
def test_a_guess_that_was_too_high_is_not_trusted(passing):
    scores = jax.random.normal(jax.random.key(0), (2, 300))
    bits = jax.lax.bitcast_convert_type(jnp.sort(scores)[:, -passing - 1 :][:, :1], jnp.int32)  # positive
    with aim(Target("gpu", "interpreted", "forward")), tuning.force("select_topk", SMALL):
        kept = gpu.keep(scores[:, None], bits, jnp.full((2, 1), -1, jnp.int32), 20)
        assert kept.count.sum(1).tolist() == [passing, passing]
        out = gpu.choose(scores, bits[:, 0], kept, 20)
    assert out.tolist() == [select(row, 20) for row in np.asarray(scores)]


def test_the_guess_is_near_and_passes_enough():
    scores = jax.random.normal(jax.random.key(1), (8, 40000))
    with aim(Target("gpu", "interpreted", "forward")):
        _, _, kept = gpu._narrow(scores, 1200)
    assert kept.count.sum(1).min() >= 1200
    assert kept.count.sum(1).max() <= 2 * 1200


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"from 1 to S choices, got k={k}"):
        select_topk(jnp.zeros((2, 4)), k)
    with pytest.raises(ValueError, match=f"from 1 to S choices, got k={k}"):
        union_topk(jnp.zeros((1, 1, 2, 4)), k)


@pytest.mark.parametrize("limit", [0, 5])
def test_limit_out_of_range(limit):
    with pytest.raises(ValueError, match=f"from 1 to S members, got limit={limit}"):
        union_topk(jnp.zeros((1, 1, 2, 4)), 2, limit=limit)


def test_nan_is_an_error_in_debug_mode():
    scores = jnp.zeros((1, 1, 2, 4)).at[0, 0, 1, 2].set(jnp.nan)
    with pytest.raises(ValueError, match="not NaN"):
        checked(lambda x: select_topk(x, 2))(scores)
    with pytest.raises(ValueError, match="not NaN"):
        checked(lambda x: union_topk(x, 2))(scores)


def test_a_nan_harms_only_its_row():
    scores = jax.random.normal(jax.random.key(2), (3, 300))
    for platform in ("gpu", "tpu"):
        with aim(Target(platform, "interpreted", "forward")), tuning.force("select_topk", SMALL):
            out = select_topk(scores.at[1, ::3].set(jnp.nan), 20, impl=platform)
        assert out[::2].tolist() == [select(row, 20) for row in np.asarray(scores[::2])]
        assert out.min() >= -1
        assert out.max() < 300


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_types_without_a_kernel(platform):
    scores = jnp.zeros((2, 4), jnp.float8_e4m3fn)
    with aim(Target(platform, "interpreted", "forward")):
        with pytest.raises(NotImplementedError, match="takes float32, bfloat16 and float16, got"):
            select_topk(scores, 2, impl=platform)
        with pytest.raises(NotImplementedError, match="takes float32, bfloat16 and float16, got"):
            union_topk(scores[None, None], 2, impl=platform)


def test_rows_beyond_vmem():
    with (
        aim(Target("tpu", "interpreted", "forward")),
        pytest.raises(NotImplementedError, match="in VMEM, got"),
    ):
        jax.eval_shape(lambda x: select_topk(x, 2, impl="tpu"), jax.ShapeDtypeStruct((8, 2**23), jnp.float32))
