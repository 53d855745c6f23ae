"""Reads GGUF files: every tensor type against its formula, every broken file refused."""

import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import bpe_metadata, gguf_tensors, sizes, write_gguf

from kvjax.models.gguf_file import GGUF_TYPES, GGUFFile
from kvjax.models.tokenizer import load_tokenizer
from kvjax.models.weights import load_weights

HALF = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)}
HALF |= {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def half(block, at):
    return float(np.frombuffer(block[at : at + 2], "<f2")[0])


def scales_k(block):
    """Returns the eight 6-bit scales and minima of a Q4_K or Q5_K block."""
    s = block[4:16]
    scale = [s[j] & 63 if j < 4 else (s[j + 4] & 15) | (s[j - 4] >> 6) << 4 for j in range(8)]
    least = [s[j + 4] & 63 if j < 4 else (s[j + 4] >> 4) | (s[j] >> 6) << 4 for j in range(8)]
    return scale, least


def value(kind, block, i):
    """Returns value i of a block, one at a time, from the format's definition."""
    d = half(block, HALF[kind][0])
    if kind == "Q8_0":
        return d * struct.unpack_from("b", block, 2 + i)[0]
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        start = {"Q4_0": 2, "Q4_1": 4, "Q5_0": 6, "Q5_1": 8}[kind]
        q = block[start + i % 16] >> (4 if i >= 16 else 0) & 15
        if kind.startswith("Q5"):
            q |= (int.from_bytes(block[start - 4 : start], "little") >> i & 1) << 4
        if kind.endswith("_1"):
            return d * q + half(block, 2)
        return d * (q - (16 if kind == "Q5_0" else 8))
    if kind in ("Q4_K", "Q5_K"):
        scale, least = scales_k(block)
        part, within = divmod(i, 32)
        start = 16 if kind == "Q4_K" else 48
        q = block[start + part // 2 * 32 + within] >> (4 if part % 2 else 0) & 15
        if kind == "Q5_K":
            q |= (block[16 + within] >> part & 1) << 4
        return d * scale[part] * q - half(block, 2) * least[part]
    part, within = divmod(i, 128)  # Q6_K
    quarter, column = divmod(within, 32)
    low = block[part * 64 + (quarter % 2) * 32 + column] >> (4 if quarter >= 2 else 0) & 15
    high = block[128 + part * 32 + column] >> (2 * quarter) & 3
    return d * struct.unpack_from("b", block, 192 + i // 16)[0] * ((low | high << 4) - 32)


def random_blocks(kind, n_rows, n_blocks, rng):
    """Returns rows of random bytes whose half-precision scales are finite."""
    size, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (n_rows, n_blocks, n_bytes), dtype=np.uint8)
    for at in HALF[kind]:
        halves = rng.normal(size=(n_rows, n_blocks, 1)).astype("<f2")
        blocks[:, :, at : at + 2] = halves.view(np.uint8)
    return blocks.reshape(n_rows, -1), size * n_blocks


@pytest.mark.parametrize("kind", HALF)
def test_each_quantisation_equals_its_formula(kind, tmp_path):
    raw, width = random_blocks(kind, 20, 3, np.random.default_rng(1))
    types = {"x": gguf.GGMLQuantizationType[kind]}
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", tensors={"x": raw}, types=types))
    assert file.shapes == {"x": (20, width)}
    size, n_bytes = gguf.GGML_QUANT_SIZES[types["x"]]
    expected = [
        [value(kind, bytes(row[b * n_bytes : (b + 1) * n_bytes]), i) for b in range(3) for i in range(size)]
        for row in raw
    ]
    got = file.rows("x", 0, 20)
    np.testing.assert_allclose(got, np.array(expected), rtol=2e-6, atol=2e-6)
    assert np.array_equal(file.rows("x", 7, 18), got[7:18])
    assert np.std(got) > 0.1


def test_every_supported_type_is_tested():
    assert {*HALF, "F32", "F16", "BF16"} == set(GGUF_TYPES)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types(kind, tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    bits = x.view(np.uint32)
    stored = {"F32": x, "F16": x.astype(np.float16), "BF16": (bits >> 16).astype(np.uint16).view(np.uint8)}
    types = {"x": gguf.GGMLQuantizationType[kind]}
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", tensors={"x": stored[kind]}, types=types))
    kept = {"F32": x, "F16": stored["F16"].astype(np.float32), "BF16": (bits & 0xFFFF0000).view(np.float32)}
    assert np.array_equal(file.rows("x", 1, 4), kept[kind][1:4])


def test_quantising_and_reading_back_is_near(tmp_path):
    x = np.random.default_rng(3).normal(size=(16, 256)).astype(np.float32)
    for kind, most in (("Q8_0", 0.02), ("Q5_1", 0.15), ("Q4_0", 0.5)):
        q = gguf.quantize(x, gguf.GGMLQuantizationType[kind])
        types = {"x": gguf.GGMLQuantizationType[kind]}
        file = GGUFFile(write_gguf(tmp_path / f"{kind}.gguf", tensors={"x": q}, types=types))
        assert 0 < np.abs(file.rows("x", 0, 16) - x).max() < most


def test_metadata_and_lists(tmp_path):
    metadata = {
        "a.text": "größe",
        "a.yes": True,
        "a.small": 1e-5,
        "a.list": [3, -4],
        "a.words": ["x", "", "ü"],
    }
    file = GGUFFile(write_gguf(tmp_path / "x.gguf", metadata=metadata))
    assert [file.metadata[k] for k in ("a.text", "a.yes", "a.small")] == ["größe", True, 1e-5]
    assert file.list("a.list") == [3, -4]
    assert file.list("a.words") == ["x", "", "ü"]
    with pytest.raises(ValueError, match=r"must hold a list under .a\.text."):
        file.list("a.text")


def header(n_tensors=0, n_values=0, rest=b"", magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, n_tensors, n_values) + rest


def text(s):
    return struct.pack("<Q", len(s)) + s


def tensor(name=b"x", dims=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HOSTILE = {
    "empty": (b"", ValueError, "begins with a 24-byte header"),
    "magic": (header(magic=b"GGML"), ValueError, "begins with b'GGUF'"),
    "old version": (header(version=1), NotImplementedError, "versions .* are read, got version=1"),
    "big endian": (header(version=3 << 24), NotImplementedError, "little-endian"),
    "tensor count": (header(n_tensors=2**62), ValueError, "must hold all that its header counts"),
    "value count": (header(n_values=2**63), ValueError, "must hold all that its header counts"),
    "string length": (header(0, 1, struct.pack("<Q", 2**63) + b"abcdefgh"), ValueError, "must hold all"),
    "not UTF-8": (header(0, 1, text(b"\xff\xfe") + struct.pack("<IQ", 4, 0)), ValueError, "UTF-8"),
    "value type": (header(0, 1, text(b"k") + struct.pack("<IQ", 99, 0)), ValueError, "between 0 and 12"),
    "list length": (
        header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 10, 2**60)),
        ValueError,
        "must hold all",
    ),
    "string list length": (
        header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 2**60)),
        ValueError,
        "must hold",
    ),
    "empty strings": (
        header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 9) + bytes(64)),
        ValueError,
        "must",
    ),
    "nested": (
        header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(8)),
        NotImplementedError,
        "lists of lists",
    ),
    "key twice": (header(0, 2, (text(b"k") + struct.pack("<II", 4, 7)) * 2), ValueError, "key stands once"),
    "alignment": (
        header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 3)),
        ValueError,
        "general.alignment is a power of two",
    ),
    "split": (
        header(0, 1, text(b"split.count") + struct.pack("<IH", 2, 2)),
        NotImplementedError,
        "split GGUF files are not read",
    ),
    "no dimension": (header(1, 0, tensor(dims=())), ValueError, "1 to 4 dimensions"),
    "five dimensions": (header(1, 0, tensor(dims=(1,) * 5)), ValueError, "1 to 4 dimensions"),
    "tensor twice": (header(2, 0, tensor(dims=(1,)) * 2 + bytes(64)), ValueError, "stands once"),
    "huge shape": (header(1, 0, tensor(dims=(2**40, 2**40)) + bytes(64)), ValueError, "end within the file"),
    "zero shape": (header(1, 0, tensor(dims=(4, 0)) + bytes(64)), ValueError, "filled blocks"),
    "part of a block": (
        header(1, 0, tensor(dims=(33,), kind=8) + bytes(64)),
        ValueError,
        "filled blocks of 32",
    ),
    "offset": (header(1, 0, tensor(offset=2**40) + bytes(64)), ValueError, "end within the file"),
    "unaligned": (header(1, 0, tensor(offset=1) + bytes(99)), ValueError, "are aligned"),
    "unknown type": (header(1, 0, tensor(kind=999) + bytes(64)), NotImplementedError, "got 999"),
    "other type": (header(1, 0, tensor(kind=10, dims=(256,)) + bytes(99)), NotImplementedError, "got 'Q2_K'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_at_once(name, tmp_path):
    content, error, match = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(error, match=match):
        GGUFFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - start < 5
    assert peak < 5e6


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf")
    file = GGUFFile(path)
    path.write_bytes(path.read_bytes()[:-600])
    name, shape = list(file.shapes.items())[-1]
    with pytest.raises(ValueError, match="the file has changed"):
        file.rows(name, 0, shape[0] if len(shape) > 1 else 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    metadata = sizes() | bpe_metadata(eos_token_id=257)
    write_gguf(path, metadata=metadata, tensors=gguf_tensors())
    assert load_tokenizer(path).encode("he") == [256]
    return path.read_bytes()


@pytest.mark.parametrize("left", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(left, whole, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(whole[: int(len(whole) * left)])
    with pytest.raises(ValueError, match=r"download it again|download the file again"):
        load_weights(path, "float32")


@settings(max_examples=150)
@given(data=st.data())
def test_corruption_gives_nothing_but_clear_errors(data, whole, tmp_path_factory):
    """Random bytes anywhere before the weights, or a cut anywhere."""
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 3000))
        new = data.draw(st.binary(min_size=1, max_size=8))
        broken[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "broken.gguf"
    path.write_bytes(broken[: data.draw(st.one_of(st.just(len(broken)), st.integers(0, len(broken))))])
    for load in (lambda: load_weights(path, "float32"), lambda: load_tokenizer(path)):
        message = None
        try:
            load()
        except (ValueError, NotImplementedError) as error:
            message = str(error)
        assert message is None or "got" in message
