"""Reads GGUF files: header checked field by field, tensors dequantised by blocks of rows.

The `gguf` package knows the types and the dequantisers; its reader trusts the file and
keeps one array per list entry, so the header is parsed here.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

__all__ = ["GGUF_TYPES", "GGUFFile", "GGUFTensor"]

GGUF_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_VERSIONS = (2, 3)
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<B",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_MAX_DIMS = 4


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies: shape as NumPy has it (rows first), bytes from the file's start."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    row_bytes: int


@dataclass(frozen=True)
class _List:
    """A metadata list left in the file until somebody asks for it."""

    type: GGUFValueType
    count: int
    offset: int


class _Cursor:
    """Walks over the header and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap, offset: int = 0):
        self.path, self.data, self.offset = path, data, offset

    def skip(self, n_bytes: int, what: str) -> int:
        """Passes n_bytes and returns where they begin."""
        start, left = self.offset, len(self.data) - self.offset
        if n_bytes > left:
            raise ValueError(
                f"a GGUF file must hold all that its header counts, got {n_bytes=} for {what} with {left=} "
                f"bytes in {str(self.path)!r}; download the file again"
            )
        self.offset += n_bytes
        return start

    def number(self, form: str, what: str) -> int | float:
        """Reads one little-endian number."""
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        """Reads one length-prefixed UTF-8 string."""
        n_bytes = self.number("<Q", what)
        start = self.skip(n_bytes, what)
        try:
            return self.data[start : start + n_bytes].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"GGUF strings are UTF-8, got {what=} with {error.reason} in {str(self.path)!r}; "
                "download the file again"
            ) from None

    def value_type(self, what: str) -> GGUFValueType:
        """Reads a metadata value type."""
        raw = self.number("<I", what)
        try:
            return GGUFValueType(raw)
        except ValueError:
            raise ValueError(
                f"a GGUF metadata type lies between 0 and {max(GGUFValueType)}, got {raw=} for {what} in "
                f"{str(self.path)!r}; download the file again"
            ) from None

    def value(self, what: str):
        """Reads one metadata value; a list is passed over and returned as its place."""
        kind = self.value_type(what)
        if kind == GGUFValueType.STRING:
            return self.text(what)
        if kind != GGUFValueType.ARRAY:
            return self._scalar(kind, what)
        kind, count = self.value_type(what), self.number("<Q", what)
        here = _List(kind, count, self.offset)
        if kind == GGUFValueType.ARRAY:
            raise NotImplementedError(
                f"lists of lists are not read from GGUF metadata, got {what=} in {str(self.path)!r}; "
                "convert the model again"
            )
        if kind == GGUFValueType.STRING:
            if count > (len(self.data) - self.offset) // 8:
                self.skip(8 * count, what)
            for _ in range(count):
                self.skip(self.number("<Q", what), what)
        else:
            self.skip(count * struct.calcsize(_SCALARS[kind]), what)
        return here

    def _scalar(self, kind: GGUFValueType, what: str):
        number = self.number(_SCALARS[kind], what)
        if kind == GGUFValueType.BOOL:
            return bool(number)
        if kind == GGUFValueType.FLOAT32:
            return float(str(np.float32(number)))  # 1e-05, as the configuration had it
        return number


class GGUFFile:
    """One GGUF file: `metadata`, `tensors` by name, and rows of any tensor as float32.

    Raises:
        ValueError: the header contradicts itself or the file's size.
        NotImplementedError: an old version, a split file, an unknown tensor type.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self.n_bytes = file.seek(0, 2)
            if self.n_bytes < 24:
                raise ValueError(
                    f"a GGUF file begins with a 24-byte header, got {self.n_bytes=} in {str(self.path)!r}; "
                    "download the file again"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._read_header(_Cursor(self.path, data))

    def _read_header(self, cursor: _Cursor) -> None:
        magic = bytes(cursor.data[:4])
        cursor.skip(4, "magic")
        if magic != b"GGUF":
            raise ValueError(
                f"a GGUF file begins with b'GGUF', got {magic=} in {str(self.path)!r}; give a .gguf file"
            )
        version = cursor.number("<I", "version")
        if version not in _VERSIONS:
            raise NotImplementedError(
                f"little-endian GGUF versions {_VERSIONS} are read, got {version=} in {str(self.path)!r}; "
                "convert the model again"
            )
        n_tensors, n_values = cursor.number("<Q", "tensor count"), cursor.number("<Q", "metadata count")
        for what, count, least in (("tensors", n_tensors, 24), ("metadata values", n_values, 13)):
            if count > (self.n_bytes - cursor.offset) // least:
                cursor.skip(count * least, f"{count} {what}")
        self.metadata = self._read_metadata(cursor, n_values)
        infos = self._read_infos(cursor, n_tensors)
        self.tensors = self._place(infos, cursor.offset)

    def _read_metadata(self, cursor: _Cursor, n_values: int) -> dict:
        metadata = {}
        for _ in range(n_values):
            key = cursor.text("a metadata key")
            if key in metadata:
                raise ValueError(
                    f"a GGUF metadata key stands once, got {key=} twice in {str(self.path)!r}; "
                    "convert the model again"
                )
            metadata[key] = cursor.value(key)
        if metadata.get("split.count", 1) not in (0, 1):
            raise NotImplementedError(
                f"split GGUF files are not read, got {metadata['split.count']=} in {str(self.path)!r}; "
                "merge the parts with llama-gguf-split --merge"
            )
        return metadata

    def _read_infos(self, cursor: _Cursor, n_tensors: int) -> dict:
        infos = {}
        for _ in range(n_tensors):
            name = cursor.text("a tensor name")
            n_dims = cursor.number("<I", name)
            if name in infos or not 1 <= n_dims <= _MAX_DIMS:
                raise ValueError(
                    f"a GGUF tensor stands once and has 1 to {_MAX_DIMS} dimensions, got {name=} with "
                    f"{n_dims=} "
                    f"in {str(self.path)!r}; convert the model again"
                )
            dims = [cursor.number("<Q", name) for _ in range(n_dims)]
            infos[name] = (tuple(reversed(dims)), cursor.number("<I", name), cursor.number("<Q", name))
        return infos

    def _place(self, infos: dict, header_bytes: int) -> dict[str, GGUFTensor]:
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(
                f"general.alignment is a power of two up to 2**20, got {alignment=} in {str(self.path)!r}; "
                "convert the model again"
            )
        data_start = -(-header_bytes // alignment) * alignment
        tensors = {}
        for name, (shape, raw_type, offset) in infos.items():
            kind = _tensor_type(name, raw_type)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if 0 in shape or shape[-1] % block:
                raise ValueError(
                    f"rows of {kind.name} are filled blocks of {block}, got {name=} of {shape=} in "
                    f"{str(self.path)!r}; convert the model again"
                )
            row_bytes = shape[-1] // block * block_bytes
            end = data_start + offset + row_bytes * math.prod(shape[:-1])
            if offset % alignment or end > self.n_bytes:
                raise ValueError(
                    f"tensors are aligned and end within the file, got {name=} from {offset=} to byte {end=} "
                    "of "
                    f"{self.n_bytes=} in {str(self.path)!r}; the file is cut short: download it again"
                )
            tensors[name] = GGUFTensor(shape, kind, data_start + offset, row_bytes)
        return tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def list(self, key: str) -> list:
        """Reads a metadata list out of the file."""
        place = self.metadata.get(key)
        if not isinstance(place, _List):
            raise ValueError(
                f"GGUF metadata must hold a list under {key!r}, got {place=} in {str(self.path)!r}; "
                "convert the model again"
            )
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(self.path, data, place.offset)
            if place.type == GGUFValueType.STRING:
                return [cursor.text(key) for _ in range(place.count)]
            dtype = np.dtype(_SCALARS[place.type])
            return np.frombuffer(data, dtype, place.count, place.offset).tolist()

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads rows [start, stop) of a tensor as float32; a vector is one row."""
        tensor = self.tensors[name]
        width = tensor.shape[-1]
        raw = np.fromfile(
            self.path,
            np.uint8,
            (stop - start) * tensor.row_bytes,
            offset=tensor.offset + start * tensor.row_bytes,
        )
        if raw.size != (stop - start) * tensor.row_bytes:
            raise ValueError(
                f"tensors end within the file, got {raw.size=} bytes for {name=} in {str(self.path)!r}; "
                "the file has changed: download it again"
            )
        # One long row: the dequantisers cut shorter ones into groups of 16 rows, which is slow.
        if tensor.type == GGMLQuantizationType.F32:
            return raw.view("<f4").reshape(-1, width)
        if tensor.type == GGMLQuantizationType.F16:
            return raw.view("<f2").astype(np.float32).reshape(-1, width)
        return gguf.dequantize(raw[None], tensor.type).reshape(-1, width)


def _tensor_type(name: str, raw_type: int) -> GGMLQuantizationType:
    """Returns the type of a tensor, or says which ones are read."""
    known = {kind.value: kind for kind in GGMLQuantizationType}
    kind = known.get(raw_type)
    if kind is None or kind.name not in GGUF_TYPES:
        got = raw_type if kind is None else kind.name
        raise NotImplementedError(
            f"tensors of type {', '.join(GGUF_TYPES)} are read from GGUF, got {got!r} for {name=}; "
            "take another quantisation of the model"
        )
    return kind
