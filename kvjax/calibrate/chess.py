"""Calibrates thresholds of activations (CHESS, CATS, TEAL): reads text a few times, and takes quantiles.

    ups       Σ|a_up| and Σa_up² of every channel             FOLDER/ups
    coarse    how many scores |x|·w lie in each of 2¹⁵ bins   FOLDER/coarse
    fine      the same within the bins of the quantiles       FOLDER/fine
    refined   gradient steps, see `refine_thresholds`         FOLDER/refined
    then the thresholds, and FOLDER/measured.json

The quantiles are exact, of all tokens, in bounded memory. A run that was interrupted goes on: counts are
stored every few documents. Layers are read together, all dense.

Source: CHESS (arXiv 2409.01366) and its released code: a quantile for each layer. Refinement is ours.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.progress import Progress

from kvjax import text
from kvjax.calibrate import activations, checkpoint, quantiles, refine_thresholds
from kvjax.model import Model, fingerprint
from kvjax.thresholds import ActivationSparsity, Site, Threshold, Thresholds, load

__all__ = ["Passes", "calibrate", "closed_form", "rescaled"]

_LEAST = 4096  # tokens
_EVERY = 8  # documents between two checkpoints


def calibrate(
    model: Model,
    documents: Int[np.ndarray, "N T"],
    folder: Path | str,
    method: ActivationSparsity,
    *,
    refine: int = 0,
    seed: int = 0,
) -> Thresholds:
    """Finds a model's thresholds, stores them in a folder and returns them.

    `folder`/measured.json has, for each layer and site, the level and the weights' range, how many channels
    never count, and after refinement the curve of its losses.

    Args:
        documents: token ids, such as `text.documents` returns.
        folder: where an interrupted run of the same calibration goes on; one that has ended is returned.
        refine: gradient steps on the KL to the dense model; layers and channels then share the sparsity.
        seed: of the steps' order of documents.

    Raises:
        ValueError: for fewer than 4,096 tokens, documents that the model cannot read, steps below 0, a
            folder of another calibration, or a damaged one.

    Cost: three passes of the model over the text; holds 2¹⁵ + 2¹⁶ counts of every layer and site. A step of
    refinement costs about six passes over 1,024 tokens.
    """
    _check(model, documents)
    if refine < 0:
        raise ValueError(f"refinement takes 0 steps or more, got {refine=}")
    folder = Path(folder)
    stamp = {
        "model": fingerprint(model),
        "dtype": str(model.dtype),
        "text": checkpoint.digest(documents),
        "method": repr(method),
    }
    ended, whole = folder / "calibration.json", stamp | {"refine": refine, "seed": seed}
    if ended.is_file():
        checkpoint.check_same(json.loads(ended.read_text(encoding="utf-8")), whole, folder)
        return load(folder, model)
    with Progress(console=Console(stderr=True)) as progress:
        passes = Passes(model, documents, folder, stamp, progress)
        (found,) = closed_form(passes, [method])
        curve: Mapping[str, np.ndarray] = {}
        if refine and method.sparsity:
            options = {"n_steps": refine, "seed": seed, "progress": progress}
            make = functools.partial(refine_thresholds.refine, model, documents, found, **options)
            learnt = checkpoint.kept(folder / "refined", whole, make)
            found, curve = refine_thresholds.restored(found, learnt), learnt
            found = rescaled(passes, found)
    found.save(folder)
    (folder / "measured.json").write_text(json.dumps(_measured(found, curve)) + "\n", encoding="utf-8")
    ended.write_text(json.dumps(whole) + "\n", encoding="utf-8")
    for name in ("ups", "coarse", "fine", "pooled", "pooled_fine"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return found


def _check(model: Model, documents: np.ndarray) -> None:
    if documents.size < _LEAST:
        raise ValueError(f"thresholds need {_LEAST:,} tokens, got {documents.size:,}: take more text")
    text.check(documents, model.config)
    if model.thresholds is not None:
        raise ValueError(f"thresholds are found with a dense model, got {model.name!r} with some")


@dataclass(frozen=True)
class Passes:
    """Passes over documents, whose sums are stored as they grow.

    Args:
        folder: None stores nothing.
        stamp: what a stored sum must have been made from.
    """

    model: Model
    documents: Int[np.ndarray, "N T"]
    folder: Path | None = None
    stamp: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    progress: Progress | None = None

    def total(self, name: str, look: Callable[..., dict], *arrays: Any) -> dict[str, np.ndarray]:
        """Returns the sums over documents of what `look` returns, see `activations.run`."""
        path = None if self.folder is None else self.folder / name
        n_done, sums = self._stored(path)
        for i in self._documents(name, n_done):
            new = activations.run(self.model, self.documents[i : i + 1], look, *arrays)
            for key, x in new.items():
                wide = np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else np.int64)
                sums[key] = sums[key] + wide if key in sums else wide
            done = i + 1
            if path is not None and (done % _EVERY == 0 or done == len(self.documents)):
                checkpoint.write(path, sums, {**self.stamp, "done": done})
        return sums

    def _stored(self, path: Path | None) -> tuple[int, dict[str, np.ndarray]]:
        """Returns how many documents have been summed, and the sums."""
        if path is None or not path.is_dir():
            return 0, {}
        about = checkpoint.read(path)[1]
        n_done = about.pop("done", 0)
        return n_done, dict(checkpoint.kept(path, {**self.stamp, "done": n_done}, dict))

    def _documents(self, name: str, n_done: int) -> Iterator[int]:
        numbers = range(n_done, len(self.documents))
        if self.progress is None:
            yield from numbers
            return
        task = self.progress.add_task(name, total=len(self.documents), completed=n_done)
        for i in numbers:
            yield i
            self.progress.advance(task)


def closed_form(passes: Passes, methods: Sequence[ActivationSparsity]) -> list[Thresholds]:
    """Returns the thresholds of several methods, from three passes in all."""
    model, n_layers = passes.model, passes.model.config.n_layers
    ups = {}
    if any(statistic for method in methods for statistic in method.sites.values()):
        n, sums = passes.documents.size, passes.total("ups", activations.up_sums)
        ups = {"mean": np.float32(sums["mean"] / n), "rms": np.float32(np.sqrt(sums["rms"] / n))}
    wanted: dict[str, set[float]] = {}  # the shares that are asked of each probe
    for method in methods:
        for site, statistic in method.sites.items():
            wanted.setdefault(_probe(site, statistic, method.group), set()).add(method.sparsity)
    weights = {probe: _weights(probe, ups, n_layers) for probe in wanted}
    probes = [
        {probe: Threshold(jnp.float32(0), weights[probe][i], group=int(probe.split()[2])) for probe in wanted}
        for i in range(n_layers)
    ]
    levels = _levels(passes, probes, wanted)

    def layer(i: int, method: ActivationSparsity) -> dict[Site, Threshold]:
        found = {}
        for site, statistic in method.sites.items():
            probe = _probe(site, statistic, method.group)
            level = levels[i, probe, method.sparsity] if method.sparsity else 0.0
            found[site] = Threshold(jnp.float32(level), weights[probe][i], group=method.group)
        return found

    return [Thresholds(m, [layer(i, m) for i in range(n_layers)], fingerprint(model)) for m in methods]


def _probe(site: Site, statistic: str | None, group: int) -> str:
    return f"{site} {statistic or 1} {group}"


def _weights(probe: str, ups: Mapping[str, np.ndarray], n_layers: int) -> list[Any]:
    statistic = probe.split()[1]
    return [None if statistic == "1" else jnp.asarray(ups[statistic][i]) for i in range(n_layers)]


def _levels(
    passes: Passes, probes: Sequence[Mapping[str, Threshold]], wanted: Mapping[str, set[float]]
) -> dict[tuple[int, str, float], np.float32]:
    """Returns the quantiles of each layer's probes."""
    coarse = passes.total("coarse", activations.counts, probes, None)
    places, bins = {}, []
    for i, layer in enumerate(probes):
        bins.append({})
        for probe in layer:
            asked = {share: quantiles.bin_of(coarse[f"{i} {probe}"], share) for share in wanted[probe]}
            places |= {(i, probe, share): at for share, at in asked.items()}
            bins[i][probe] = sorted({b for b, _ in asked.values()})
    fine = passes.total("fine", activations.counts, probes, _as_arrays(bins))
    return {
        (i, probe, share): quantiles.value_of(at, fine[f"{i} {probe}"][bins[i][probe].index(at[0])])
        for (i, probe, share), at in places.items()
    }


def _as_arrays(bins: list[dict[str, list[int]]]) -> list[dict[str, np.ndarray]]:
    """Returns bins as arrays of one length, filled up with -1: layers then have one program."""
    n = max(len(b) for layer in bins for b in layer.values())
    return [{probe: np.int32(b + [-1] * (n - len(b))) for probe, b in layer.items()} for layer in bins]


def rescaled(passes: Passes, thresholds: Thresholds) -> Thresholds:
    """Returns thresholds times one factor, with which the model as a whole has the method's sparsity.

    A channel counts as often as it has weights that are not read.
    """
    c = passes.model.config
    probes = [
        {str(site): _relative(t, site.rows(c)) for site, t in layer.items()} for layer in thresholds.layers
    ]
    n_weights = {str(site): site.row_weights(c) for site in thresholds.method.sites}

    def pooled(counts: Mapping[str, np.ndarray]) -> np.ndarray:
        return sum(x * n_weights[name.split()[1]] for name, x in counts.items())

    coarse = pooled(passes.total("pooled", activations.counts, probes, None))
    place = quantiles.bin_of(coarse, thresholds.method.sparsity)
    bins = [{probe: np.int32([place[0]]) for probe in layer} for layer in probes]
    fine = pooled(passes.total("pooled_fine", activations.counts, probes, bins))[0]
    factor = quantiles.value_of(place, fine)
    layers = [
        {site: t.replace(level=t.level * factor) for site, t in layer.items()} for layer in thresholds.layers
    ]
    return dataclasses.replace(thresholds, layers=layers)


def _relative(threshold: Threshold, n: int) -> Threshold:
    """Returns one whose scores of n channels are multiples of the level."""
    weight = jnp.ones(n) if threshold.weight is None else threshold.weight
    scale = jnp.maximum(threshold.level, jnp.finfo(jnp.float32).tiny)
    return threshold.replace(level=jnp.float32(0), weight=weight / scale)


def _measured(thresholds: Thresholds, curve: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns what is known of each layer, as JSON has it."""

    def one(t: Threshold) -> dict[str, Any]:
        if t.weight is None:
            return {"level": float(t.level)}
        w = np.asarray(t.weight)
        found = {"weights": [float(w.min()), float(w.max())], "never": int((w == 0).sum())}
        return {"level": float(t.level), **found}

    layers = [{site.name: one(t) for site, t in layer.items()} for layer in thresholds.layers]
    names = ("kl", "sparsity", "held_out")
    return {"layers": layers} | {name: np.asarray(curve[name]).tolist() for name in names if name in curve}
