"""Calibrates A²ATS: reads text once, then clusters the keys of one layer after the other.

    statistics     all layers in one pass over the text                 FOLDER/statistics, gone at the end
    layer 0, 1, …  k-means in the frame of the metric, refinement       FOLDER/layer_000, …
    codebooks      what the method takes                                FOLDER/codebooks
    measured       what was seen on the way, see `calibrate`            FOLDER/measured.json

What is done is stored, so a run that was interrupted goes on; chance is drawn per layer from the seed, so it
ends as if it had not been.

Source: A²ATS (arXiv 2502.12665) with the constants of its released code: 4096 centroids, b = 2048, w = 64.
Which layers are attended densely is ours: the paper skips none, and attention that is flat has no top-k.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.progress import Progress

from kvjax import text
from kvjax.calibrate import checkpoint, codebooks, kmeans, refine, statistics
from kvjax.calibrate.codebooks import Codebooks
from kvjax.calibrate.statistics import Statistics
from kvjax.methods import layers
from kvjax.model import Model, fingerprint

__all__ = ["Settings", "calibrate"]

_LEAST = 10  # vectors per centroid
_QUERIES = 512  # tokens whose queries are kept, for refinement


@dataclass(frozen=True)
class Settings:
    """How codebooks are made.

    Args:
        n_centroids: C, per KV head.
        per_centroid: keys that are kept for each centroid; what memory is bounded by.
        query_aware: weigh errors of keys by queries; False is plain vector quantisation.
        refine: steps of refinement on attention itself; 0 = none.
        far: b, the distance in tokens that queries are rotated by.
        window: w in tokens.
        flat_below: a layer is attended densely where exact top 3% (with window and sinks) catches less than
            this share of its attention. In SmolLM2-135M that is layer 0 alone.
        seed: the same seed finds the same codebooks.
    """

    n_centroids: int = 4096
    per_centroid: int = 20
    query_aware: bool = True
    refine: int = 0
    far: int = 2048
    window: int = 64
    flat_below: float = 0.7
    seed: int = 0


def calibrate(
    model: Model,
    documents: Int[np.ndarray, "N T"],
    folder: Path | str,
    settings: Settings = Settings(),
) -> Codebooks:
    """Finds a model's codebooks, stores them in a folder and returns them.

    `folder`/measured.json says, for each layer without a window: `share`, the attention that an exact choice
    catches (see `statistics.share`); `losses` [R K] of each iteration of k-means; after refinement
    `held_out` [R K], see `refine`.

    Args:
        documents: token ids, such as `text.documents` and `text.uuids` return.
        folder: where an interrupted run of the same calibration goes on.

    Raises:
        ValueError: for fewer than 10 keys per centroid, codes that int16 does not hold, documents that the
            model cannot read, a folder with another calibration or a damaged one, or a model whose layers
            all have windows.

    Cost: the model's over the text; per layer that of `kmeans.fit`; holds `per_centroid`·C keys of every
    KV head.
    """
    _check(model, documents, settings)
    folder, c = Path(folder), model.config
    stamp = {
        "model": fingerprint(model),
        "dtype": str(model.dtype),
        "text": checkpoint.digest(documents),
        "settings": dataclasses.asdict(settings),
    }
    with Progress(console=Console(stderr=True)) as progress:
        seen = functools.cache(lambda: _statistics(model, documents, folder, settings, stamp, progress))
        parts = {}
        ranked = [i for i in range(c.n_layers) if c.layer_windows[i] is None]
        for i in progress.track(ranked, description="Clustering"):
            make = functools.partial(_layer, model, i, settings, seen)
            parts[i] = checkpoint.kept(folder / f"layer_{i:03}", stamp, make)
    found = _assemble(model, parts, settings)
    codebooks.save(found, folder)
    (folder / "measured.json").write_text(json.dumps(_measured(parts)) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "statistics", ignore_errors=True)
    return found


def _check(model: Model, documents: np.ndarray, settings: Settings) -> None:
    n, c = settings.n_centroids, model.config
    n_keys = min(settings.per_centroid * n, documents.size)
    if all(c.layer_windows):
        raise ValueError(f"layers with a window have no far keys, got nothing but those in {model.name}")
    if not 1 <= n <= 2**15:
        raise ValueError(f"codes are int16, so there are 1 to 32,768 centroids, got n_centroids={n}")
    if n_keys < _LEAST * n:
        raise ValueError(
            f"each centroid needs {_LEAST} keys, got {n_keys} of {documents.size} tokens for "
            f"n_centroids={n}: take more text, or fewer centroids"
        )
    text.check(documents, model.config)


def _statistics(
    model: Model, documents: np.ndarray, folder: Path, settings: Settings, stamp: dict, progress: Progress
) -> Statistics:
    def make() -> dict[str, np.ndarray]:
        task = progress.add_task("Reading", total=len(documents))
        found = statistics.collect(
            model,
            documents,
            n_keys=settings.per_centroid * settings.n_centroids,
            n_queries=_QUERIES,
            far=settings.far,
            window=settings.window,
            seed=settings.seed,
            each=lambda: progress.advance(task),
        )
        return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}

    return Statistics(**checkpoint.kept(folder / "statistics", stamp, make))


def _layer(
    model: Model, index: int, settings: Settings, seen: Callable[[], Statistics]
) -> dict[str, np.ndarray]:
    """Returns the codebooks of one layer, their frame, and what is known of it."""
    found, c = seen(), model.config
    plain = np.tile(np.eye(c.head_dim, dtype=np.float32), (c.n_kv_heads, 1, 1))
    metric = statistics.metric(found.q2[index]) if settings.query_aware else plain
    keys = np.float32(found.keys[index])
    x = jnp.einsum("knd,kde->kne", keys, metric, precision=jax.lax.Precision.HIGHEST)
    first, second = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), index))
    learnt = refine.split(x, 1)[0] if settings.refine else x
    centroids, losses = kmeans.fit(learnt, first, n_centroids=settings.n_centroids)
    run = np.asarray(losses)[~np.isnan(losses).all(axis=1)]
    part = {"metric": metric, "share": found.share[index : index + 1], "losses": run}
    if settings.refine:
        back = np.linalg.inv(np.float64(metric))
        y = np.einsum("rkgd,ked->kgre", found.queries[index], back, optimize=True).astype(np.float32)
        layer = layers(c)[index]
        centroids, part["held_out"] = refine.refine(
            centroids, x, jnp.asarray(y), second, layer=layer, n_steps=settings.refine
        )
    return part | {"centroids": np.asarray(centroids)}


def _measured(parts: Mapping[int, Mapping[str, np.ndarray]]) -> dict[int, dict[str, Any]]:
    """Returns what is known of each layer beside its codebooks, as JSON has it."""
    names = ("losses", "held_out")
    return {
        i: {"share": float(part["share"][0])} | {name: part[name].tolist() for name in names if name in part}
        for i, part in parts.items()
    }


def _assemble(model: Model, parts: Mapping[int, Mapping[str, Any]], settings: Settings) -> Codebooks:
    """Joins the layers; those with a window have no codebook."""
    c = model.config
    centroids = np.zeros((c.n_layers, c.n_kv_heads, settings.n_centroids, c.head_dim), np.float32)
    metric = np.tile(np.eye(c.head_dim, dtype=np.float32), (c.n_layers, c.n_kv_heads, 1, 1))
    for i, part in parts.items():
        centroids[i], metric[i] = part["centroids"], part["metric"]
    flat = tuple(
        i not in parts or float(parts[i]["share"][0]) < settings.flat_below for i in range(c.n_layers)
    )
    return Codebooks(centroids, metric, flat, fingerprint(model), settings.far, settings.window)
