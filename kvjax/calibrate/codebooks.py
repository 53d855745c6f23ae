"""Codebooks of A²ATS: what ranking keys by codes needs to know of a model.

    code(k) = argmin_j ‖k A − c'_j‖²,  A Aᵀ = Q2        so the error minimised is (k − c) Q2 (k − c)ᵀ
    q̃·c = (q̃ A⁻ᵀ)·c'

Keys and queries are un-rotated, and q̃ is the query rotated to the one distance that stands for all far keys.

Source: A²ATS (arXiv 2502.12665), query-aware vector quantisation.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from kvjax.calibrate import checkpoint
from kvjax.model import Model, fingerprint

__all__ = ["Codebooks", "load", "save"]


@dataclass(frozen=True, eq=False)
class Codebooks:
    """A codebook for each KV head of a model.

    Args:
        centroids: c', in the frame of the metric. Those of layers with a window are zeros.
        metric: A, with which keys come into that frame; the identity is plain quantisation.
        flat: per layer, whether it is attended densely: its attention is flat, or it has a window.
        model: the fingerprint of the model.
        far: the distance in tokens, b, that queries are rotated by to rank far keys.
        window: tokens, w; keys that are nearer are far from none, and not ranked.
    """

    centroids: Float[np.ndarray, "L K C D"] | Float[Array, "L K C D"]
    metric: Float[np.ndarray, "L K D D"] | Float[Array, "L K D D"]
    flat: tuple[bool, ...]
    model: str
    far: int
    window: int

    def layer(self, index: int) -> "Codebooks":
        """Returns those of one layer, L = 1; the same object each time."""
        return self._layers[index]

    @functools.cached_property
    def _layers(self) -> tuple["Codebooks", ...]:
        parts = [slice(i, i + 1) for i in range(len(self.flat))]
        with jax.ensure_compile_time_eval():  # kept beyond the trace that may ask for them first
            return tuple(
                replace(self, centroids=self.centroids[part], metric=self.metric[part], flat=self.flat[part])
                for part in parts
            )


def save(codebooks: Codebooks, folder: Path | str) -> None:
    """Writes an Orbax checkpoint to `folder`/codebooks."""
    arrays = {name: np.asarray(getattr(codebooks, name)) for name in ("centroids", "metric")}
    about = {name: getattr(codebooks, name) for name in ("flat", "model", "far", "window")}
    checkpoint.write(Path(folder) / "codebooks", arrays, about)


def load(folder: Path | str, model: Model) -> Codebooks:
    """Reads codebooks.

    Raises:
        ValueError: for a checkpoint that is not whole, or that of another model.
        FileNotFoundError: where there is no folder.
    """
    path = Path(folder) / "codebooks"
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"codebooks are a folder of `kvjax calibrate a2ats`, got {str(folder)!r}")
    arrays, about = checkpoint.read(path)
    try:
        found = {name: arrays[name].shape for name in ("centroids", "metric")}
        n_layers, n_heads, n_centroids, size = found["centroids"]
        flat = tuple(map(bool, about["flat"]))
        of, far, window = str(about["model"]), int(about["far"]), int(about["window"])
        if found["metric"] != (n_layers, n_heads, size, size) or len(flat) != n_layers:
            raise ValueError(f"shapes disagree: {found}, {len(flat)} layers")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} holds no codebooks ({error!r}): calibrate anew") from error
    c = model.config
    wanted = (c.n_layers, c.n_kv_heads, n_centroids, c.head_dim)
    if of != fingerprint(model) or found["centroids"] != wanted:
        raise ValueError(
            f"codebooks belong to one model, got those of another in {str(path)!r}, which are "
            f"{found['centroids']} for {wanted}: calibrate {model.name}"
        )
    return Codebooks(arrays["centroids"], arrays["metric"], flat, of, far, window)
