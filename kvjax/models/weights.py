"""Loads a checkpoint into the decoder's parameters, one tensor at a time.

**Cost**: peak host memory is the parameters in the target dtype plus one block of rows per
thread; each tensor is read, dequantised, cast and transposed block by block into the buffer
that JAX then owns (on the CPU without a copy). The largest tensors come first, so that on an
accelerator the last host buffer is a small one.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.models.config import ModelConfig
from kvjax.models.families import config_from_hf, nearest
from kvjax.models.gguf_config import config_from_gguf
from kvjax.models.gguf_file import GGUFFile
from kvjax.models.safetensors_file import HFFolder
from kvjax.models.tensor_names import Origin, gguf_origins, hf_origins, hf_prefix

__all__ = ["DTYPES", "load_weights", "open_checkpoint", "read_config"]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_BLOCK_VALUES = 1 << 16  # small enough that temporaries stay in cache and off fresh pages
_THREADS = min(4, os.cpu_count() or 1)
_ALIGN = 64  # bytes; JAX takes over a host buffer aligned so, and copies any other
# Tensors that files may hold besides the decoder's own, by the beginning or end of their names.
_OTHER_PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
_OTHER_SUFFIXES = (".rotary_emb.inv_freq",)
_TIED_COPIES = ("lm_head.weight", "language_model.lm_head.weight")


def load_weights(path: str | Path, dtype) -> tuple[ModelConfig, dict]:
    """Returns the config and the parameters of a Hugging Face folder or a .gguf file.

    Args:
        path: a folder with config.json and safetensors, or a .gguf file.
        dtype: float32 or bfloat16, by name or as a dtype; norm scales are float32 always.

    Raises:
        FileNotFoundError: nothing there, or a shard is missing.
        ValueError: a damaged file; missing, unexpected or wrongly shaped tensors.
        NotImplementedError: an architecture, feature or tensor type that is not supported.
    """
    dtype = _dtype(dtype)
    config, source, origins = open_checkpoint(path)
    shapes = config.param_shapes()
    params: dict = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for name in sorted(shapes, key=lambda name: -math.prod(shapes[name])):
            kind = jnp.float32 if name.endswith("/scale") else dtype
            array = _read(source, origins[name], shapes[name], np.dtype(kind), pool)
            *parents, leaf = name.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = jax.device_put(array, may_alias=True)
            del array
    return config, params


def read_config(path: str | Path) -> ModelConfig:
    """Returns the config of a folder or file without reading its tensors."""
    return open_checkpoint(path)[0]


def open_checkpoint(path: str | Path) -> tuple[ModelConfig, GGUFFile | HFFolder, dict[str, Origin]]:
    """Opens a checkpoint and checks that it holds exactly the parameters of its config."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"a model is a folder or a .gguf file, got {str(path)!r}, which does not exist"
        )
    if path.is_dir():
        source = HFFolder(path)
        config = config_from_hf(source.config)
        _fits(config, source)
        origins = hf_origins(config, hf_prefix(source.tensors))
    else:
        source = GGUFFile(path)
        config = config_from_gguf(source)
        _fits(config, source)
        origins = gguf_origins(config, source.metadata["general.architecture"])
    _check_tensors(config, source, origins)
    return config, source, origins


def _dtype(dtype):
    """Returns the jax dtype; unknown ones get the nearest name."""
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(
            f"weights are loaded as {' or '.join(DTYPES)}, got {name!r}; try {nearest(name, DTYPES)!r}"
        )
    return DTYPES[name]


def _fits(config: ModelConfig, source) -> None:
    """Stops a config whose layers cannot all be in the file, before names are made for them."""
    if config.n_layers > len(source.tensors):
        raise ValueError(
            f"every layer has tensors, got {config.n_layers=} and {len(source.tensors)} tensors in "
            f"{str(source.path)!r}; the file is not the config's: download both again"
        )


def _check_tensors(config: ModelConfig, source, origins: dict[str, Origin]) -> None:
    """Compares the names and shapes of a checkpoint with those of the config."""
    found, used = source.shapes, {origin.tensor for origin in origins.values()}
    missing = sorted(used - set(found))
    if missing:
        raise ValueError(
            f"a {config.family} checkpoint holds {len(used)} tensors, got {len(missing)} missing, among them "
            f"{missing[:3]} in {str(source.path)!r}; download it again"
        )
    for path, shape in config.param_shapes().items():
        origin = origins[path]
        expected = shape[::-1] if origin.transposed else shape
        if found[origin.tensor] != expected:
            raise ValueError(
                f"{origin.tensor} has the shape {expected} in this config, got {found[origin.tensor]} in "
                f"{str(source.path)!r}; the file is not the config's: download both again"
            )
    allowed = {"rope_freqs.weight"} | (set(_TIED_COPIES) if config.tied_embeddings else set())
    unexpected = sorted(
        name
        for name in set(found) - used - allowed
        if not name.startswith(_OTHER_PREFIXES) and not name.endswith(_OTHER_SUFFIXES)
    )
    if unexpected:
        raise NotImplementedError(
            f"a {config.family} decoder has no place for other tensors, got {len(unexpected)}, among them "
            f"{unexpected[:3]} in {str(source.path)!r}; choose a model without them"
        )


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array aligned so that JAX need not copy it."""
    n_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(n_bytes + _ALIGN, np.uint8)
    start = -buffer.ctypes.data % _ALIGN
    return buffer[start : start + n_bytes].view(dtype).reshape(shape)


def _read(
    source, origin: Origin, shape: tuple[int, ...], dtype: np.dtype, pool: ThreadPoolExecutor
) -> np.ndarray:
    """Reads one tensor into a new array of the target shape and dtype, by blocks of rows."""
    target = _empty(shape, dtype)
    table = target.T if origin.transposed else target
    order = _unpaired(table.shape[0], origin.paired_heads) if origin.paired_heads else None
    if table.ndim == 1:
        row = source.rows(origin.tensor, 0, 1)[0]
        target[slice(None) if order is None else order] = row.astype(np.float32) + np.float32(origin.shift)
        return target
    n_rows, width = table.shape
    step = max(1, _BLOCK_VALUES // width)

    def fill(start: int) -> None:
        stop = min(start + step, n_rows)
        rows = slice(start, stop) if order is None else order[start:stop]
        table[rows] = source.rows(origin.tensor, start, stop).astype(dtype, copy=False)  # cast while in cache

    for _ in pool.map(fill, range(0, n_rows, step)):
        pass
    return target


def _unpaired(n_rows: int, n_heads: int) -> np.ndarray:
    """Returns where each row of a pairwise-rotary projection belongs in a half-split one."""
    return np.arange(n_rows).reshape(n_heads, 2, -1).swapaxes(1, 2).reshape(-1)
