"""Reads Hugging Face folders: config.json, and safetensors in one file or in shards.

A safetensors file is eight bytes of header length, a JSON header, and the raw tensors; all
of it is checked against the file's size before a byte of data is read.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

__all__ = ["SAFETENSORS_TYPES", "HFFolder", "SafeTensor", "read_header", "read_json"]

SAFETENSORS_TYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER = 100_000_000
_MAX_JSON = 200_000_000
_AGAIN = "download it again"


@dataclass(frozen=True)
class SafeTensor:
    """Where one tensor lies: its file, and the bytes from that file's start."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


def read_json(path: Path):
    """Reads a JSON file of a model folder.

    Raises:
        ValueError: not JSON, or larger than any real one.
    """
    if path.stat().st_size > _MAX_JSON:
        raise ValueError(
            f"a model's JSON has up to {_MAX_JSON} bytes, got {path.stat().st_size} in {str(path)!r}"
        )
    return _parse(path.read_bytes(), path)


def _parse(text: bytes, path: Path):
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} holds valid JSON, got {error} in {str(path)!r}; {_AGAIN}") from None


def _object(pairs: list) -> dict:
    """Returns a JSON object whose keys stand once."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key that stands twice")
    return result


def read_header(path: Path) -> dict[str, SafeTensor]:
    """Reads and checks the header of one safetensors file.

    Raises:
        ValueError: lengths, shapes or offsets that contradict each other or the file.
        NotImplementedError: a tensor type other than F32, F16, BF16.
    """
    with open(path, "rb") as file:
        n_bytes = file.seek(0, 2)
        file.seek(0)
        header_bytes = int.from_bytes(file.read(8), "little")
        if n_bytes < 10 or not 2 <= header_bytes <= min(n_bytes - 8, _MAX_HEADER):
            raise ValueError(
                f"a safetensors header lies within its file, got {header_bytes=} in {n_bytes=} of "
                f"{str(path)!r}; "
                f"{_AGAIN}"
            )
        header = _parse(file.read(header_bytes), path)
    if not isinstance(header, dict):
        raise ValueError(
            f"a safetensors header is an object, got {type(header).__name__} in {str(path)!r}; {_AGAIN}"
        )
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _tensor(path, name, entry, start)
        spans.append(span)
    end = 0
    for span in sorted(spans):
        if span[0] != end:
            raise ValueError(
                f"safetensors data has neither gap nor overlap, got {span=} after byte {end=} in "
                f"{str(path)!r}; "
                f"{_AGAIN}"
            )
        end = span[1]
    if start + end != n_bytes:
        raise ValueError(
            f"a safetensors file ends with its last tensor, got {n_bytes=} where the header says "
            f"{start + end} "
            f"in {str(path)!r}; the file is cut short or too long: {_AGAIN}"
        )
    return tensors


def _tensor(path: Path, name: str, entry, start: int) -> tuple[SafeTensor, tuple[int, int]]:
    """Checks one header entry; returns the tensor and its span within the data."""
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (_counts(shape) and _counts(span) and len(span) == 2 and len(shape) <= 8):
        raise ValueError(
            f"a safetensors entry has a dtype, a shape and two offsets, got {entry=} for {name=} in "
            f"{str(path)!r}; "
            f"{_AGAIN}"
        )
    if not isinstance(kind, str) or kind not in SAFETENSORS_TYPES:
        raise NotImplementedError(
            f"tensors of type {', '.join(SAFETENSORS_TYPES)} are read, got {kind!r} for {name=} in "
            f"{str(path)!r}; "
            "take the model in one of these types"
        )
    dtype = SAFETENSORS_TYPES[kind]
    if span[1] - span[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"a tensor's bytes follow from shape and dtype, got {shape=}, {kind=}, {span=} for {name=} in "
            f"{str(path)!r}; {_AGAIN}"
        )
    return SafeTensor(path, tuple(shape), dtype, start + span[0]), (span[0], span[1])


def _counts(value) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)


class HFFolder:
    """One Hugging Face folder: `config`, tensors by name, and rows of any tensor as stored.

    Raises:
        FileNotFoundError: no config.json, no safetensors, or a shard is missing.
        ValueError: a file contradicts itself, its size, or the index.
        NotImplementedError: a tensor type other than F32, F16, BF16.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        config = self.path / "config.json"
        if not config.is_file():
            raise FileNotFoundError(
                f"a model folder holds config.json, got {str(self.path)!r} without it; give the folder of a "
                "Hugging Face model, or a .gguf file"
            )
        self.config = read_json(config)
        if not isinstance(self.config, dict):
            raise ValueError(
                f"config.json is an object, got {type(self.config).__name__} in {str(config)!r}; {_AGAIN}"
            )
        self.tensors = self._read_tensors()

    def _read_tensors(self) -> dict[str, SafeTensor]:
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            single = self.path / "model.safetensors"
            if not single.is_file():
                raise FileNotFoundError(
                    "a model folder holds model.safetensors or model.safetensors.index.json, got "
                    f"{str(self.path)!r} with neither; download it again, as safetensors"
                )
            return read_header(single)
        shard_of = _weight_map(index)
        tensors = {}
        for shard in sorted(set(shard_of.values())):
            if not (self.path / shard).is_file():
                raise FileNotFoundError(
                    f"all shards lie in the folder, got {str(self.path)!r} without {shard!r}; download it "
                    "again"
                )
            found = read_header(self.path / shard)
            listed = {name for name, where in shard_of.items() if where == shard}
            if listed != set(found):
                odd = sorted(listed ^ set(found))
                raise ValueError(
                    f"index and shard hold the same tensors, got {odd[:3]=} in only one of them for "
                    f"{shard!r} in "
                    f"{str(self.path)!r}; {_AGAIN}"
                )
            tensors |= found
        return tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads rows [start, stop) of a tensor in its stored type; a vector is one row."""
        tensor = self.tensors[name]
        width = tensor.shape[-1]
        count = (stop - start) * width
        offset = tensor.offset + start * width * tensor.dtype.itemsize
        data = np.fromfile(tensor.path, tensor.dtype, count, offset=offset)
        if data.size != count:
            raise ValueError(
                f"tensors end within the file, got {data.size=} of {count} values for {name=} in "
                f"{str(tensor.path)!r}; the file has changed: {_AGAIN}"
            )
        return data.reshape(-1, width)


def _weight_map(index: Path) -> dict[str, str]:
    """Returns tensor name -> shard, checked to name files of this folder only."""
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    plain = isinstance(shards, dict) and all(
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and Path(shard).name == shard
        and "\\" not in shard
        for shard in shards.values()
    )
    if not plain or not shards:
        raise ValueError(
            "the index's weight_map names a .safetensors file of this folder for each tensor, got "
            f"{str(index)!r} "
            f"without that; {_AGAIN}"
        )
    return shards
