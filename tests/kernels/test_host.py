"""Pages hold what rows hold, whoever reads and writes them, and are refused where they do not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from pallas_kernels import fetch_rows, stow_rows
from pallas_kernels.backend import Target, aim
from pallas_kernels.fetch_rows import gpu as fetch_rows_gpu
from pallas_kernels.host import Blocks, Pages, as_pages, as_rows, empty_pages, on_host, pack, unpack

HOST = jax.memory.Space.Host
RNG = np.random.default_rng(3)
SLOTS = (80, 64)  # a last block cut short
BOTH = tuple(2 * s for s in SLOTS)  # rows of keys and values


def rows(*shape, dtype="bfloat16"):
    return jnp.asarray(64 * RNG.normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8"])
def test_words_give_the_bits_of_the_rows(dtype):
    block = 64 if dtype == "uint8" else 32
    x = jnp.abs(rows(2, 3, block, 128, dtype=dtype))
    words = pack(x)
    assert (words.shape[-1], words.dtype, words.nbytes) == (256, jnp.int32, x.nbytes)
    np.testing.assert_array_equal(unpack(words, x.dtype, 128), x)


def test_a_word_of_a_page_holds_rows_half_a_block_apart():
    x = rows(32, 128)
    high, low = np.divmod(np.asarray(pack(x)).view(np.uint32), 1 << 16)
    bits = np.asarray(x).view(np.uint16).reshape(2, 8, 256)
    np.testing.assert_array_equal(np.stack([low, high]), bits)


def test_pages_give_the_rows_of_heads_that_end_within_one():
    x, blocks = rows(2, sum(SLOTS), 128), Blocks(SLOTS, 32)
    pages = as_pages(x, blocks)
    assert (pages.words.shape, pages.block) == ((2, 5, 8, 256), 32)
    np.testing.assert_array_equal(as_rows(pages, SLOTS), x)
    np.testing.assert_array_equal(as_rows(x, SLOTS), x)


@pytest.mark.parametrize("place", [jax.memory.Space.Device, HOST])
def test_rows_are_written_into_pages_as_into_rows(place):
    x, staged = rows(2, sum(SLOTS), 128), rows(2, 2, 40, 128)
    first, end = jnp.asarray([[70, 3], [31, 60]]), jnp.asarray([[90, 43], [31, 99]])
    expected = stow_rows(x, staged, first, end, slots=SLOTS)
    pages = jax.device_put(as_pages(x, Blocks(SLOTS, 32)), place)
    out = jax.jit(lambda *args: stow_rows(*args, slots=SLOTS))(pages, staged, first, end)
    assert on_host(out) == (place == HOST)
    np.testing.assert_array_equal(as_rows(jax.device_put(out, jax.memory.Space.Device), SLOTS), expected)


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("n", [0, 1, 64, 65, 150])
@pytest.mark.parametrize("programs", [1, 3, 4])  # 4: two take turns at each head's tiles
def test_programs_walk_through_lists_to_their_ends(n, order, programs, monkeypatch):
    """Of 150 places the first n name a row, of which every third has no line."""
    monkeypatch.setattr(fetch_rows_gpu, "_PROGRAMS", programs)
    near, staged = (tuple(rows(1, *n, 16) for _ in range(2)) for n in ((2 * 150,), (2, 8)))
    far = rows(1, 2 * 2 * 200, 16)
    place = jnp.arange(150)
    idx, line = (
        jnp.broadcast_to(jnp.where(inside, x, -1), (1, 2, 150))
        for inside, x in ((place < n, 199 - place), (place % 3 > 0, place[::-1]))
    )
    rest = staged, idx, line, jnp.full((1, 2), 192)
    blocks = Blocks((200, 200))
    with aim(Target("gpu", "interpreted", order)):
        out = fetch_rows(near, far, *rest, blocks=blocks, impl="gpu")
    expected = fetch_rows(near, far, *rest, blocks=blocks, impl="reference")
    for mine, other, before in zip(out, expected, near, strict=True):
        np.testing.assert_array_equal(mine, other)
        assert int((mine != before).any(-1).sum()) == 2 * (n - -(-n // 3))


@pytest.mark.parametrize("first", [0, 20, 64])
def test_lines_are_of_pages_as_of_rows(first):
    """Rows that neither a page nor the staged ones hold stay as they were."""
    x, blocks = rows(1, 2 * sum(SLOTS), 128), Blocks(SLOTS, 32)
    near, staged = (tuple(rows(1, *n, 128) for _ in range(2)) for n in ((2 * 4 * 32,), (2, 10)))
    idx, line = jnp.asarray([[[2, 0, -1], [0, 1, 1]]]), jnp.asarray([[[1, 3, 0], [2, -1, 0]]])
    rest = staged, idx, line, jnp.full((1, 2), first)
    expected = fetch_rows(near, x, *rest, blocks=blocks)
    pages = as_pages(x, Blocks(BOTH, 64))
    with aim(Target("tpu", "interpreted", "forward")):
        mine = fetch_rows(near, pages, *rest, blocks=blocks, impl="tpu")
    of_host = fetch_rows(near, jax.device_put(pages, HOST), *rest, blocks=blocks)
    for out in (mine, of_host, fetch_rows(near, pages, *rest, blocks=blocks, impl="reference")):
        np.testing.assert_array_equal(out[0], expected[0])
        np.testing.assert_array_equal(out[1], expected[1])


@pytest.mark.parametrize(
    ("size", "dtype", "block", "least"),
    [
        (128, "bfloat16", 16, 32),
        (128, "float32", 24, 16),
        (64, "bfloat16", 32, 64),
        (80, "bfloat16", 64, 256),
    ],
)
def test_blocks_of_parts_of_pages_are_refused(size, dtype, block, least):
    with pytest.raises(ValueError, match=f"whole pages of 8 KiB.*take a multiple of {least} rows"):
        empty_pages(1, Blocks((256,), block), size, dtype)
    assert empty_pages(1, Blocks((256,), least), size, dtype).block == least


def call(op, far, impl=None, block=16):
    staged, at = rows(1, 2, 8, 128), jnp.zeros((1, 2), jnp.int32)
    if op == "stow_rows":
        return stow_rows(far, staged, at, at, slots=SLOTS, impl=impl)
    lists, near = (jnp.zeros((1, 2, 1), jnp.int32),) * 2, (rows(1, 2 * 4 * 32, 128),) * 2
    return fetch_rows(near, far, (staged, staged), *lists, at, blocks=Blocks(SLOTS, block), impl=impl)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("fetch_rows", {"block": 32}, "pages hold keys and values of blocks, got 32 rows of 128 bfloat16"),
        ("fetch_rows", {"words": 4}, r"two rows per slot, got .*\(1, 4, 8, 256\)"),
        ("fetch_rows", {"dtype": "float16"}, "got 32 rows of 128 float16"),
        ("stow_rows", {"words": 4}, r"a row per slot and staged rows are of its type, got \(1, 4, 128\)"),
        ("stow_rows", {"dtype": "float16"}, "got .* float16"),
    ],
)
def test_pages_that_do_not_fit_are_refused(op, change, message):
    words = jnp.zeros((1, change.get("words", 5), 8, 256), jnp.int32)
    pages = Pages(words, jnp.dtype(change.get("dtype", "bfloat16")), 128)
    with pytest.raises(ValueError, match=message):
        call(op, pages, block=change.get("block", 16))


def test_each_kernel_takes_its_own_form():
    x, one = rows(1, sum(BOTH), 128), rows(1, sum(SLOTS), 128)
    with aim(Target("gpu", "interpreted", "forward")):
        with pytest.raises(NotImplementedError, match=r"pages are a TPU's.*give rows or codes"):
            call("fetch_rows", as_pages(x, Blocks(BOTH, 32)), "gpu")
        with pytest.raises(NotImplementedError, match=r"pages are a TPU's.*give rows"):
            call("stow_rows", as_pages(one, Blocks(SLOTS, 32)), "gpu")
    with (
        aim(Target("tpu", "interpreted", "forward")),
        pytest.raises(NotImplementedError, match=r"a TPU copies pages, got .*pack rows by `as_pages`"),
    ):
        call("fetch_rows", x, "tpu")


def test_blocks_after_the_end_of_a_list_are_an_error_in_debug_mode():
    near, staged = ((rows(1, *n, 8),) * 2 for n in ((4,), (1, 2)))
    lists = jnp.asarray([[[3, -1, 1]]]), jnp.asarray([[[0, 1, 2]]])
    copy = kvjax.debug(functools.partial(fetch_rows, blocks=Blocks((6,))))
    with pytest.raises(ValueError, match="a -1 ends a head's list of blocks"):
        copy(near, rows(1, 12, 8), staged, *lists, jnp.full((1, 1), 6))


def test_bytes_that_offsets_do_not_reach_are_refused():
    def trace(dtype):
        far, staged = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, 2**24, 128), (1, 1, 8, 128)))
        at = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        write = functools.partial(stow_rows, slots=(2**24,), impl="gpu")
        with aim(Target("gpu", "NVIDIA H100 80GB HBM3")):
            return jax.eval_shape(write, far, staged, at, at)

    with pytest.raises(NotImplementedError, match="two in a word"):
        trace(jnp.uint8)
    assert trace(jnp.uint16).shape == (1, 2**24, 128)
