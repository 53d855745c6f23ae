"""Decode attention: the reference against loops in float64, edge cases of the kernels, and messages."""

import inspect
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import backend, dispatch, tolerance, tuning
from pallas_kernels.attention import AttentionForm, Codes, quantize
from pallas_kernels.backend import Target, aim, checked
from pallas_kernels.decode_attention import decode_attention, gpu, tpu
from pallas_kernels.decode_attention.specs import DecodeSpec

PLATFORMS = ("cpu", "gpu", "tpu")
KERNELS = ("gpu", "tpu")


def attend(platform, *args, chosen=None, **options):
    """Runs the platform's implementation, interpreted; chosen: settings of the kernel."""
    impl = "reference" if platform == "cpu" else platform
    with aim(Target(platform, "interpreted", "forward")), tuning.force("decode_attention", chosen):
        out = decode_attention(*args, **options, impl=impl)
    assert not backend.races()
    return out


def inputs(slots, *, batch=2, group=2, size=64, dtype="float32", bits=16, seed=0, blocks=(None, None)):
    """Random q, k, v, mass and length: fractional masses, slots of none that hold NaN, and lengths from 0."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(batch, len(slots), group, size)), dtype)
    k, v = (jnp.asarray(x, dtype) for x in rng.normal(size=(2, batch, sum(slots), size)))
    mass = np.maximum(rng.uniform(-1, 4, (batch, sum(slots))), 0)
    length = jnp.asarray([[rng.integers(0, s + 1) for s in slots] for _ in range(batch)], jnp.int32)
    if bits < 16:
        k, v = (quantize(x, bits, slots, block) for x, block in zip((k, v), blocks, strict=True))
    else:
        k, v = (jnp.where(mass[..., None] > 0, x, jnp.nan) for x in (k, v))
    return q, k, v, jnp.asarray(mass, jnp.float32), length


def rows(store, slots):
    """The values of a store in float64: code times scale plus zero, one number at a time."""
    if not isinstance(store, Codes):
        return np.asarray(store, np.float64)
    codes, scale, zero = (np.asarray(x, np.float64) for x in (store.codes, store.scale, store.zero))
    size = codes.shape[2] * 8 // store.bits
    out = np.zeros((*codes.shape[:2], size))
    for b, d in np.ndindex(codes.shape[0], size):
        row = first_block = 0
        for n in slots:
            for slot in range(n):
                byte = int(codes[b, row, d * store.bits // 8])
                code = byte if store.bits == 8 else (byte >> 4 if d % 2 else byte & 15)
                at = (b, row, 0) if store.block is None else (b, first_block + slot // store.block, d)
                out[b, row, d] = code * scale[at] + zero[at]
                row += 1
            first_block += -(-n // store.block) if store.block else 0
    return out


def loops(q, k, v, mass, length, form):
    """The equation in float64, one query head and one slot at a time."""
    q, k, v, mass = np.asarray(q, np.float64), rows(k, form.slots), rows(v, form.slots), np.asarray(mass)
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    first = np.cumsum([0, *form.slots])
    for b, head, g in np.ndindex(q.shape[:3]):
        alive = [first[head] + s for s in range(length[b, head]) if mass[b, first[head] + s] > 0]
        logits = []
        for row in alive:
            logit = sum(q[b, head, g] * k[b, row]) * form.factor(q.shape[3])
            if form.softcap is not None:
                logit = form.softcap * np.tanh(logit / form.softcap)
            logits.append(logit + np.log(float(mass[b, row])))
        if alive:
            lse[b, head, g] = np.logaddexp.reduce(logits)
            out[b, head, g] = sum(
                np.exp(x - lse[b, head, g]) * v[b, row] for x, row in zip(logits, alive, strict=True)
            )
    return out, lse


@settings(max_examples=8)  # every shape compiles anew
@given(
    slots=st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple),
    group=st.integers(1, 3),
    size=st.sampled_from([2, 4, 6]),
    bits=st.sampled_from([16, 8, 4]),
    blocks=st.tuples(*[st.sampled_from([None, 1, 3, 8])] * 2),
    scale=st.sampled_from([None, 0.3]),
    softcap=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 1000),
)
def test_the_reference_is_the_equation(slots, group, size, bits, blocks, scale, softcap, seed):
    arrays = inputs(slots, group=group, size=size, bits=bits, blocks=blocks, seed=seed)
    form = AttentionForm(slots, scale=scale, softcap=softcap, lse=True)
    out = decode_attention(*arrays, form=form, impl="reference")
    for a, b in zip(out, loops(*arrays, form), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_no_length_is_all_slots_and_the_log_sum_exp_is_asked_for():
    q, k, v, mass, _ = inputs((5, 9))
    full = jnp.asarray([[5, 9]] * 2, jnp.int32)
    form = AttentionForm((5, 9), lse=True)
    expected, _ = decode_attention(q, k, v, mass, full, form=form, impl="reference")
    out = decode_attention(q, k, v, mass, form=AttentionForm((5, 9)), impl="reference")
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_heads_without_slots_give_nothing(platform):
    """Of length 0 or less, or of mass 0 everywhere: 0, a log-sum-exp of -inf, and no harm to the others."""
    slots = (40, 24, 33, 64)
    q, k, v, mass, _ = inputs(slots)
    mass = mass.at[:, 97:].set(0)  # the last head
    k, v = (x.at[:, :40].set(jnp.inf).at[:, 97:].set(jnp.nan) for x in (k, v))
    length = jnp.asarray([[0, 24, 33, 64], [-5, 50, 9, 64]], jnp.int32)  # 50: beyond the head, so all of it
    out, lse = attend(platform, q, k, v, mass, length, form=AttentionForm(slots, lse=True))
    expected, expected_lse = loops(q, k, v, mass, np.clip(length, 0, slots), AttentionForm(slots))
    assert (np.asarray(out)[:, [0, 3]] == 0).all()
    assert np.isneginf(np.asarray(lse)[:, [0, 3]]).all()
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_head_with_a_hole_is_read_in_full_and_padding_is_not(platform):
    slots = (40, 24)
    q, k, v, mass, _ = inputs(slots, batch=3)
    k, v, mass = jnp.nan_to_num(k), jnp.nan_to_num(v), mass.at[:, 39].set(1).at[:, 63].set(0)
    length, pos = jnp.asarray([[7, 9]] * 3, jnp.int32), jnp.asarray([5, -1, 0], jnp.int32)
    form = AttentionForm(slots, lse=True, holes=True)
    out, lse = attend(platform, q, k, v, mass, length, pos, form=form)
    # The first head's last slot counts, so that slot 7 is a hole; the other's is empty, so that it ends at 9.
    expected, _ = loops(q, k, v, mass, np.asarray([[40, 9], [0, 0], [40, 9]]), AttentionForm(slots))
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    assert (np.asarray(out)[1] == 0).all()
    assert np.isneginf(np.asarray(lse)[1]).all()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_nan_that_counts_is_not_hidden(platform):
    q, k, v, _, _ = inputs((64,))
    k, v = jnp.nan_to_num(k), jnp.nan_to_num(v).at[1, 5, 3].set(jnp.nan)
    out = attend(platform, q, k, v, jnp.ones((2, 64)), form=AttentionForm((64,)))
    assert np.isnan(np.asarray(out)[1, :, :, 3]).all()
    assert np.isfinite(np.asarray(out)[0]).all()


SEVERAL = {
    "rows along sublanes": ((7, 249, 128, 140, 1), {"size": 128}),
    "rows along lanes": ((130, 129, 60), {"batch": 3, "size": 64}),
    "two shares of heads": ((300, 129), {"batch": 1, "size": 128, "dtype": "bfloat16"}),
    "8 bits, scales per row": ((70, 200), {"size": 128, "bits": 8}),
    "4 bits, scales per row": ((70, 200), {"size": 64, "bits": 4}),
    "8 bits, scales per block": (
        (512 + 32, 96, 450),
        {"batch": 1, "size": 128, "bits": 8, "blocks": (32, None)},
    ),
    "4 bits, scales per block": ((256 + 16, 96), {"batch": 1, "size": 256, "bits": 4, "blocks": (16, None)}),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_tpu_kernel_over_several_blocks(name):
    """Heads that begin and end inside blocks, and blocks that hold no live slot."""
    slots, how = SEVERAL[name]
    arrays, form = inputs(slots, **how), AttentionForm(slots, lse=True)
    expected = decode_attention(*arrays, form=form, impl="reference")
    out = attend("tpu", *arrays, form=form, chosen=tpu.Settings(block=128))
    assert tolerance.error(out, expected) <= tolerance.limit(how.get("dtype", "float32"), max(slots))


def test_tpu_kernel_reads_no_block_beyond_the_live_ones(monkeypatch):
    """A program whose block is dead points at the last live one of its head, which is there already."""
    slots, length, grids = (600, 300, 700), [[129, 0, 700]], []

    def call(kernel, items, length, *operands, grid_spec, out_shape, **options):
        grids.append((grid_spec, np.asarray(items), np.asarray(length)))
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setattr(tpu, "tpu_call", call)
    q, k, v, mass, _ = inputs(slots, batch=1, size=128)
    with jax.disable_jit():
        attend("tpu", q, k, v, mass, jnp.asarray(length), form=AttentionForm(slots), chosen=tpu.Settings(128))
    ((grid_spec, items, length),) = grids
    shares, n_items = grid_spec.grid
    read = [
        [tuple(int(x) for x in spec.index_map(n, i, items, length)) for i in range(n_items)]
        for n in range(shares)  # the first two heads, the last head
        for spec in grid_spec.in_specs[1:]  # k, v and mass
    ]
    assert [list(dict.fromkeys(x)) for x in read] == [
        [(0, 0, 0), (0, 1, 0), (0, 4, 0)],
        [(0, 0, 0), (0, 1, 0), (0, 4, 0)],
        [(0, 0, 0), (0, 0, 1), (0, 0, 4)],
        [(0, at, 0) for at in range(7, 13)],
        [(0, at, 0) for at in range(7, 13)],
        [(0, 0, at) for at in range(7, 13)],
    ]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1.6e4])
def test_gpu_kernel_of_codes_takes_values_of_any_size(size, bits):
    slots = (512,)
    q, k, v, mass, length = inputs(slots, batch=1, group=3, dtype="bfloat16")
    k, v = (jnp.where(jnp.isnan(x), 0, x) for x in (k, v))
    store = quantize((v * size).astype(v.dtype), bits, slots, None)  # rows up to 65,504 fit float16
    args = q, quantize(k, bits, slots, 32), store, mass, length
    form = AttentionForm(slots)
    expected, out = (attend(p, *args, form=form).astype(jnp.float32) for p in ("cpu", "gpu"))
    assert tolerance.error(out, expected) < tolerance.limit("bfloat16", 512)


@pytest.mark.parametrize("block", [32, 128])
def test_gpu_kernel_over_several_splits(block):
    arrays, form = inputs((7, 320, 40, 1)), AttentionForm((7, 320, 40, 1), lse=True)
    expected = decode_attention(*arrays, form=form, impl="reference")
    out = attend("gpu", *arrays, form=form, chosen=gpu.Settings(block=block, programs=8))
    assert tolerance.error(out, expected) <= tolerance.limit("float32", 320)


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        (DecodeSpec(8, 4, 128, (32768,) * 8), 4.5),
        (DecodeSpec(8, 4, 64, (32768,) * 8), 2.5),
        (DecodeSpec(8, 32, 128, (32768,) * 8), 6),
        (DecodeSpec(8, 4, 128, (32768,) * 8, bits=8), 3.5),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_tpu_kernel_states_its_vmem(spec, most):
    """Two blocks of 2,048 keys and values, and room for its work, in MiB."""
    shapes = jax.eval_shape(spec.arrays, jax.random.key(0))
    held = tpu.vmem_bytes(2048, shapes["q"], shapes["k"], shapes["v"]) / 2**20
    assert 4 * 2048 * spec.head_dim * spec.bits / 8 / 2**20 < held < most


Q, FORM = (2, 2, 3, 64), AttentionForm((24, 16))


def plain(**changes):
    """Arguments of a small call; changes: other shapes, or other arguments."""
    shapes = {"q": Q, "k": (2, 40, 64), "v": (2, 40, 64), "mass": (2, 40), "length": (2, 2)}
    shapes |= {name: shape for name, shape in changes.items() if isinstance(shape, tuple)}
    made = {name: jnp.ones(shape, "int32" if name == "length" else None) for name, shape in shapes.items()}
    return made | {"form": FORM} | {k: v for k, v in changes.items() if not isinstance(v, tuple)}


def codes(width, *, bits=8, scale=(2, 40, 1), zero=(2, 40, 1), block=None):
    return Codes(jnp.zeros((2, 40, width), jnp.uint8), jnp.ones(scale), jnp.ones(zero), bits, block)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": AttentionForm((40,))}, r"one positive capacity per KV head, got form.slots=\(40,\)"),
        ({"form": AttentionForm((40, 0))}, r"one positive capacity per KV head, got form.slots=\(40, 0\)"),
        (
            {"k": (2, 39, 64)},
            r"k has a row per slot and the head size of q, \(2, 40, 64\), got \(2, 39, 64\)",
        ),
        (
            {"v": (2, 40, 32)},
            r"v has a row per slot and the head size of q, \(2, 40, 64\), got \(2, 40, 32\)",
        ),
        ({"k": codes(64, bits=4)}, r"k has a row per slot .*\(2, 40, 32\), got \(2, 40, 64\)"),
        ({"v": codes(64, bits=2)}, r"codes have 4 or 8 bits, got v.bits=2"),
        ({"k": codes(64, scale=(2, 40, 2))}, r"k has scales and zeros \(2, 40, 1\), got \(2, 40, 2\)"),
        ({"v": codes(64, zero=(2, 2, 64), block=16)}, r"v has scales and zeros \(2, 3, 64\), got .*2, 2, 64"),
        ({"mass": (2, 39)}, r"one mass per slot, \(2, 40\), got mass.shape=\(2, 39\)"),
        ({"length": (2, 3)}, r"one length per row and KV head, .* got length.shape=\(2, 3\)"),
        ({"pos": (3,)}, r"and one position per row, got length.shape=\(2, 2\) and \(3,\)"),
    ],
)
def test_shapes_that_disagree_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(decode_attention)(**plain(**changes))  # as it is without the tests' checks of shapes


@pytest.mark.parametrize("mass", [-1.0, float("nan")])
def test_debug_mode_finds_masses_that_are_none(mass):
    bad = plain(mass=jnp.ones((2, 40)).at[1, 7].set(mass))
    with pytest.raises(ValueError, match="a mass is a number of tokens: it is not negative and not NaN"):
        checked(lambda: decode_attention(**bad, impl="reference"))()
    assert np.isfinite(checked(lambda: decode_attention(**plain(), impl="reference"))()).all()


def quantized(block_k, block_v, size=64, slots=(24, 16)):
    """Arguments with codes in blocks."""
    q, k, v, mass, length = inputs(slots, size=size, bits=8, blocks=(block_k, block_v))
    return {"q": q, "k": k, "v": v, "mass": mass, "length": length, "form": AttentionForm(slots)}


def wide(dtype, size):
    """Arguments in another type or head size."""
    changed = plain(q=(2, 2, 3, size), k=(2, 40, size), v=(2, 40, size))
    return changed | {name: changed[name].astype(dtype) for name in "qkv"}


@pytest.mark.parametrize(
    ("platform", "args", "message"),
    [
        ("gpu", lambda: wide("float8_e4m3fn", 64), "takes float32, bfloat16 and float16, got q.dtype"),
        ("tpu", lambda: wide("float8_e4m3fn", 64), "takes float32, bfloat16 and float16, got q.dtype"),
        ("gpu", lambda: wide("float32", 8), "takes head sizes from 16 to 256, got D=8"),
        ("gpu", lambda: wide("float32", 512), "takes head sizes from 16 to 256, got D=512"),
        ("tpu", lambda: wide("float32", 20), "takes head sizes in multiples of 8, got D=20: pad"),
        ("tpu", lambda: wide("float32", 24576), "has 16777216 bytes of VMEM, and 128 slots need .*use impl="),
        ("gpu", lambda: plain(k=jnp.ones((2, 40, 64), "bfloat16")), "have the type of q, got bfloat16"),
        ("tpu", lambda: plain(k=jnp.ones((2, 40, 64), "bfloat16")), "k has the type of q, got bfloat16"),
        ("tpu", lambda: plain(v=jnp.ones((2, 40, 64), "bfloat16")), "v has the type of q, got bfloat16"),
        ("gpu", lambda: quantized(8, None), "codes in blocks of 16 to 128, a power of 2, got block=8"),
        ("tpu", lambda: quantized(8, None), "codes in blocks of 16 to 128, a power of 2, got k.block=8"),
        ("gpu", lambda: quantized(16, 32), "keys and values share their block, got 16 and 32"),
        ("tpu", lambda: quantized(16, 16), "values with one scale per row, got v.block=16: quantise"),
        ("tpu", lambda: quantized(16, None), r"start where a block does, got form.slots=\(24, 16\)"),
        (
            "tpu",
            lambda: plain(k=codes(12, bits=4), q=(2, 2, 3, 24), v=(2, 40, 24)),
            "multiples of 16, got D=24",
        ),
    ],
)
def test_kernels_refuse_what_they_cannot_take(platform, args, message):
    args = args()
    with aim(Target(platform, "interpreted", "forward")), pytest.raises(NotImplementedError, match=message):
        decode_attention(**args, impl=platform)


@pytest.mark.parametrize("platform", KERNELS)
def test_where_a_kernel_refuses_the_reference_runs_and_says_so(platform, caplog):
    args = quantized(8, None)
    dispatch._warn.cache_clear()
    with (
        aim(Target(platform, "interpreted", "forward")),
        dispatch.watch() as taken,
        caplog.at_level(logging.INFO, "pallas_kernels"),
    ):
        out = decode_attention(**args)
        decode_attention(**args)
    assert taken == {"decode_attention": "reference"}
    warning, choice, again = caplog.records  # a reason is given once
    assert warning.levelname == "WARNING"
    message = warning.getMessage()
    assert f"decode_attention: the {platform} kernel does not take this, so the reference runs" in message
    assert "got" in message
    assert choice.getMessage() == again.getMessage() == "decode_attention: reference"
    np.testing.assert_array_equal(out, decode_attention(**args, impl="reference"))


def test_a_gpu_before_ampere_runs_the_reference_and_says_so(caplog):
    with aim(Target("gpu", "Tesla T4", capability=(7, 5))), dispatch.watch() as taken:
        out = decode_attention(**plain())
        message = "compute capability 8.0 .* got 7.5 of 'Tesla T4': use impl='reference'"
        with pytest.raises(NotImplementedError, match=message):
            decode_attention(**plain(), impl="gpu")
    assert taken == {"decode_attention": "reference"}
    assert "so the reference runs" in caplog.text
    np.testing.assert_array_equal(out, decode_attention(**plain(), impl="reference"))


@pytest.mark.parametrize(
    ("platform", "version", "expected"),
    [
        ("gpu", "9.0", Target("gpu", "some", capability=(9, 0))),
        ("gpu", "gfx942", Target("rocm", "some")),
        ("tpu", None, Target("tpu", "some")),
    ],
)
def test_the_target_is_the_default_device(monkeypatch, platform, version, expected):
    device = types.SimpleNamespace(platform=platform, device_kind="some", compute_capability=version)
    monkeypatch.setattr(jax, "devices", lambda backend=None: [device])
    assert backend.target() == expected


@pytest.mark.parametrize("platform", PLATFORMS)
def test_none_takes_the_kernel_of_the_platform(platform, caplog):
    name = "reference" if platform == "cpu" else platform
    with (
        aim(Target(platform, "interpreted", "forward")),
        dispatch.watch() as taken,
        caplog.at_level(logging.INFO, "pallas_kernels"),
    ):
        decode_attention(**plain())
    assert taken == {"decode_attention": name}
    assert [record.getMessage() for record in caplog.records] == [f"decode_attention: {name}"]


def test_watching_ends_with_its_block():
    with dispatch.watch() as outer:
        with dispatch.watch() as inner:
            decode_attention(**plain())
        assert inner == {"decode_attention": "reference"}
    assert outer == {}


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="has the implementations reference, gpu, tpu, got impl='cuda'"):
        decode_attention(**plain(), impl="cuda")


@pytest.mark.parametrize(
    ("impl", "platform"), [("gpu", "cpu"), ("tpu", "cpu"), ("tpu", "gpu"), ("gpu", "tpu")]
)
def test_an_implementation_of_another_platform_is_refused(impl, platform):
    message = f"impl='{impl}' runs on a {impl.upper()}, got platform '{platform}': use impl='reference'"
    with aim(Target(platform, "interpreted", "forward")), pytest.raises(NotImplementedError, match=message):
        decode_attention(**plain(), impl=impl)
