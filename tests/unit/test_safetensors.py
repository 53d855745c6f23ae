"""Reads Hugging Face folders: types, shards, and every broken file refused."""

import json
import shutil
import struct
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import FAMILIES, read_safetensors, write_safetensors

from kvjax.models.safetensors_file import HFFolder, read_header
from kvjax.models.weights import load_weights


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden llama3 folder: one file, tied embeddings."""
    return shutil.copytree(FAMILIES / "llama3", tmp_path / "llama3")


@pytest.fixture
def sharded(tmp_path):
    """A copy of the golden llama folder: three shards."""
    return shutil.copytree(FAMILIES / "llama", tmp_path / "llama")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_types_and_rows(dtype, tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(dtype)
    write_safetensors(tmp_path / "model.safetensors", {"y": np.zeros(2, np.float32), "x": x})
    (tmp_path / "config.json").write_text("{}")
    source = HFFolder(tmp_path)
    assert source.shapes == {"y": (2,), "x": (5, 3)}
    assert np.array_equal(source.rows("x", 1, 4), x[1:4])
    assert source.rows("x", 0, 5).dtype == dtype


def test_shards_hold_what_the_package_reads(sharded):
    source, expected = HFFolder(sharded), read_safetensors(sharded)
    assert source.shapes == {name: x.shape for name, x in expected.items()}
    for name, x in expected.items():
        assert np.array_equal(source.rows(name, 0, x.shape[0] if x.ndim > 1 else 1).reshape(x.shape), x)


def entry(**changes):
    """Returns an edit of the header entry of tensor x."""
    return lambda entries: {"x": entries["x"] | changes}


HOSTILE = {
    "shape and bytes": (entry(shape=[7]), ValueError, "bytes follow from shape and dtype"),
    "huge shape": (entry(shape=[2**60, 2**60]), ValueError, "bytes follow from shape"),
    "negative": (entry(shape=[-2, -2]), ValueError, "a dtype, a shape and two offsets"),
    "not numbers": (entry(shape="4"), ValueError, "a dtype, a shape and two offsets"),
    "booleans": (entry(shape=[True, 4]), ValueError, "a dtype, a shape and two offsets"),
    "offset beyond": (entry(data_offsets=[2**40, 2**40 + 16]), ValueError, "neither gap nor overlap"),
    "offsets turned": (entry(data_offsets=[16, 0]), ValueError, "bytes follow"),
    "type": (entry(dtype="F64"), NotImplementedError, "got 'F64' for name='x'"),
    "type is a list": (entry(dtype=["F32"]), NotImplementedError, "got .'F32'. for"),
    "no entry": (lambda e: {"x": 3}, ValueError, "a dtype, a shape"),
    "not an object": (lambda e: [1], ValueError, "header is an object"),
    "not JSON": (lambda e: b"{" * 40, ValueError, "holds valid JSON"),
    "deep JSON": (lambda e: b"[" * 200_000, ValueError, "holds valid JSON"),
    "not UTF-8": (lambda e: b'{"\xff": 1}', ValueError, "holds valid JSON"),
    "name twice": (lambda e: b'{"x": 1, "x": 2}', ValueError, "stands twice"),
    "overlap": (lambda e: {"x": e["x"], "y": e["x"]}, ValueError, "neither gap nor overlap"),
    "data left over": (lambda e: {}, ValueError, "ends with its last tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_at_once(name, tmp_path):
    edit, error, match = HOSTILE[name]
    path = write_safetensors(tmp_path / "x.safetensors", {"x": np.zeros(4, np.float32)}, header=edit)
    with pytest.raises(error, match=match):
        read_header(path)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**62, 2**64 - 1])
def test_hostile_header_lengths_are_refused_at_once(length, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(100))
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(ValueError, match="header lies within its file"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert time.monotonic() - start < 2


def test_empty_and_truncated_files(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for n_bytes, match in ((0, "header lies within"), (50, "header lies within"), (-1, "cut short")):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(ValueError, match=match):
            load_weights(folder, "float32")


def test_a_file_that_shrinks_after_opening_is_refused(folder):
    source = HFFolder(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])
    name, shape = list(source.shapes.items())[-1]
    with pytest.raises(ValueError, match="the file has changed"):
        source.rows(name, 0, shape[0] if len(shape) > 1 else 1)


def test_missing_files_are_named(folder, sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"without 'model-00002-of-00003.safetensors'"):
        load_weights(sharded, "float32")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds model\.safetensors or"):
        load_weights(folder, "float32")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds config\.json"):
        load_weights(folder, "float32")


def edit_index(sharded, edit):
    path = sharded / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(edit(content["weight_map"])))


@pytest.mark.parametrize(
    "shard", ["../../etc/passwd.safetensors", "/x.safetensors", "a\\b.safetensors", 3, "x.bin"]
)
def test_the_index_names_files_of_its_folder_only(shard, sharded):
    edit_index(sharded, lambda m: {"weight_map": m | {"model.norm.weight": shard}})
    with pytest.raises(ValueError, match=r"names a \.safetensors file of this folder"):
        load_weights(sharded, "float32")


def test_index_and_shards_agree(sharded):
    edit_index(sharded, lambda m: {"weight_map": {k: v for k, v in m.items() if k != "model.norm.weight"}})
    with pytest.raises(ValueError, match=r"same tensors, got .*model\.norm\.weight"):
        load_weights(sharded, "float32")
    edit_index(sharded, lambda m: {"weights": m})
    with pytest.raises(ValueError, match="weight_map names"):
        load_weights(sharded, "float32")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "valid JSON"),
        ('{"model_type": 3}', "names its 'model_type', got 3"),
        ("[]", "is an object, got list"),
        ('{"a": 1, "a": 2}', "stands twice"),
    ],
)
def test_broken_configs_are_refused(text, match, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        load_weights(folder, "float32")


def test_an_oversized_config_is_refused(folder, monkeypatch):
    monkeypatch.setattr("kvjax.models.safetensors_file._MAX_JSON", 10)
    with pytest.raises(ValueError, match="JSON has up to 10 bytes"):
        load_weights(folder, "float32")


@settings(max_examples=100)
@given(data=st.data())
def test_corruption_gives_nothing_but_clear_errors(data, tmp_path_factory):
    """Random bytes in header and config, or a cut anywhere."""
    source, target = FAMILIES / "llama3", tmp_path_factory.getbasetemp() / "broken"
    shutil.copytree(source, target, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    broken = bytearray((source / name).read_bytes())
    n_header = min(len(broken), 5000)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, n_header - 1))
        new = data.draw(
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"9", b"-", b"null", b"{"]))
        )
        broken[at : at + len(new)] = new
    cut = data.draw(st.one_of(st.just(len(broken)), st.integers(0, len(broken))))
    (target / name).write_bytes(broken[:cut])
    message = None
    try:
        load_weights(target, "float32")
    except (ValueError, NotImplementedError) as error:
        message = str(error)
    assert message is None or "got" in message
