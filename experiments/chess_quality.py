"""What activation sparsity costs: methods at equal sparsity, their thresholds in closed form and refined.

A row's figures are those of the whole model on text that no threshold was made from, every token sparse:
the KL to the dense model, the perplexity and the top-1 agreement of all positions. `sparsity` is what was
measured there, of the weights at sparse sites; `sites` has it by site and layer. `ffn_error` is the relative
error of a feed-forward block's output, ‖ŷ − y‖ / ‖y‖, given what the dense model gives it, mean over layers.
`rates` are 33 quantiles, over channels, of how often a channel of the gate lives, mean over layers; `unions`
are the shares that 1, 2, 4, 8 tokens far apart need together. `off` is how far a layer's site is from the
sparsity asked for, at most, on other documents of the thresholds' text, given what the dense model gives.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import kvjax
from experiments import chess_plot, results
from experiments.rows import check_apart, measured, side_by_side, start
from kvjax import measure, spec, text
from kvjax.calibrate import activations, chess, refine_thresholds
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import FeedForward
from kvjax.sparsity import SPARSITIES
from kvjax.thresholds import ActivationSparsity, Site, Thresholds

__all__ = ["Quality", "quality"]

_BATCHES = (1, 2, 4, 8)
_N_RATES = 33
_OTHERS = 2  # documents of the thresholds' text that they are not made from


@dataclass(frozen=True)
class Quality:
    """What to compare at equal sparsity.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: text files, or pydoc_data.topics, that are scored.
        learned: text files, or pydoc_data.topics, that thresholds are made from.
        docs: documents that are scored.
        context: tokens of one.
        tokens: that thresholds are made from.
        length: tokens of a document that they are made from.
        methods: such as chess:plus=True.
        sparsities: shares of the activations that are left out.
        refine: gradient steps; 0 leaves such rows out.
        seed: chooses documents, and their order in refinement.
        workers: rows that are measured side by side.
        out: the folder of results.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    learned: tuple[str, ...] = ()
    docs: int = 8
    context: int = 1024
    tokens: int = 65536
    length: int = 2048
    methods: tuple[str, ...] = (*SPARSITIES, "chess:plus=True")
    sparsities: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    refine: int = 0
    seed: int = 0
    workers: int = 1
    out: Path = results.FOLDER


def quality(settings: Quality) -> int:
    """Scores each method that is not stored yet, prints the rows, draws them and claims their figures.

    Raises:
        ValueError: where text is scored that thresholds are made from, or there is none to make them from.
    """
    check_apart("thresholds", settings)
    methods = {
        (name, share): spec.parse(name, SPARSITIES, sparsity=share)
        for share in settings.sparsities
        for name in settings.methods
    }
    tried = _Tried(settings, kvjax.load(settings.model, settings.dtype), list(methods.values()))
    stored, tries = start("chess", "quality", settings), []
    forms = ("closed", *(["refined"] if settings.refine else []))
    stored = measured(stored, {"name": "dense", "sparsity_asked": 0.0, "form": "closed"}, tried.dense_figures)
    for (name, share), method in methods.items():
        for form in forms:
            row = {"name": name, "sparsity_asked": share, "form": form}
            tries.append((row, functools.partial(tried.figures, method, form)))
    if any(stored.find(row) is None for row, _ in tries):
        _ = tried.closed, tried.dense
    stored = side_by_side(stored, tries, settings.workers)
    rows = [stored.find(row) for row, _ in tries]
    stored = stored.claim(_claims(settings.model, rows))
    chess_plot.draw(rows, stored.path.with_suffix(".png"))
    print(stored.path)
    return 0


def _claims(model: str, rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the figures that are quoted, `<model>.<method>.<form>.<figure>@<sparsity>`."""
    names = ("kl", "perplexity", "top1", "sparsity", "ffn_error")
    return {
        f"{model.split('-')[0]}.{row['name']}.{row['form']}.{name}@{row['sparsity_asked']:g}": row[name]
        for row in rows
        for name in names
    }


@dataclass(eq=False)
class _Tried:
    """What methods are tried on, each part read when it is first needed."""

    settings: Quality
    model: kvjax.Model
    methods: list[ActivationSparsity]

    @functools.cached_property
    def documents(self) -> Int[np.ndarray, "N T"]:
        s = self.settings
        return text.documents(self.model.tokenizer, s.texts, s.docs, s.context, s.seed)

    @functools.cached_property
    def learned(self) -> Int[np.ndarray, "N T"]:
        """The documents that thresholds are made from, and two others of the same text."""
        s = self.settings
        return text.documents(
            self.model.tokenizer, s.learned, s.tokens // s.length + _OTHERS, s.length, s.seed
        )

    @functools.cached_property
    def passes(self) -> chess.Passes:
        return chess.Passes(self.model, self.learned[:-_OTHERS])

    @functools.cached_property
    def closed(self) -> dict[ActivationSparsity, Thresholds]:
        return {found.method: found for found in chess.closed_form(self.passes, self.methods)}

    @functools.cached_property
    def dense(self) -> list[Float[np.ndarray, "T V"]]:
        return [np.asarray(logits) for logits, *_ in self._read(self.model, ())]

    def _read(self, model: kvjax.Model, layers: Any) -> Iterator[tuple]:
        for row in self.documents:
            yield activations.run(model, row[None], _looked, layers, last_only=False)

    def thresholds(self, method: ActivationSparsity, form: str) -> Thresholds:
        """Returns thresholds in closed form, or refined and brought back to the method's sparsity."""
        found = self.closed[method]
        if form == "closed":
            return found
        s = self.settings
        learnt = refine_thresholds.refine(
            self.model, self.passes.documents, found, n_steps=s.refine, seed=s.seed
        )
        return chess.rescaled(self.passes, refine_thresholds.restored(found, learnt))

    def dense_figures(self) -> dict[str, Any]:
        """Returns the perplexity of the dense model."""
        nll = [_nll(jnp.asarray(x), row) for x, row in zip(self.dense, self.documents, strict=True)]
        return {"kl": 0.0, "top1": 1.0, "perplexity": float(np.exp(np.mean(nll)))}

    def figures(self, method: ActivationSparsity, form: str) -> dict[str, Any]:
        """Returns a row's figures."""
        found, config = self.thresholds(method, form), self.model.config
        kl, top1, nll, looks = [], [], [], []
        for ids, dense, (logits, *look) in zip(
            self.documents, self.dense, self._read(found.apply(self.model), found.layers), strict=True
        ):
            full = jnp.asarray(dense)
            kl.append(float(measure.kl(full, logits).mean()))
            top1.append(measure.top1_agreement(full, logits))
            nll.append(_nll(logits, ids))
            looks.append(jax.tree.map(np.asarray, look))
        zeros, rates, union = jax.tree.map(lambda *x: np.mean(x, axis=0), *looks)
        errors = self._ffn_errors(found)
        return {
            "spec": repr(method), "kl": float(np.mean(kl)), "kl_documents": kl, "top1": float(np.mean(top1)),
            "perplexity": float(np.exp(np.mean(nll))), "sparsity": _overall(zeros, config),
            "ffn_error": float(np.mean(errors)), "ffn_error_layers": errors, "off": self._off(found),
            "sites": {site.name: [float(layer[site]) for layer in zeros] for site in zeros[0]},
            "rates": np.quantile(rates, np.linspace(0, 1, _N_RATES), axis=-1).mean(-1).tolist(),
            "unions": dict(zip(map(str, _BATCHES), union.mean(0).tolist(), strict=True)),
        }  # fmt: skip

    def _off(self, thresholds: Thresholds) -> float:
        """Returns how far a layer's site is from the method's sparsity, at most."""
        layers = tuple(thresholds.layers)
        runs = [
            activations.run(self.model, row[None], _looked, layers, last_only=False)[1]
            for row in self.learned[-_OTHERS:]
        ]
        zeros = jax.tree.map(lambda *x: float(np.mean(x)), *runs)
        return max(abs(x - thresholds.method.sparsity) for layer in zeros for x in layer.values())

    def _ffn_errors(self, thresholds: Thresholds) -> list[float]:
        """Returns the relative error of each feed-forward block on the first document's dense inputs."""
        inputs = activations.run(self.model, self.documents[:1], _ffn_inputs)
        errors = []
        for i, x in enumerate(inputs):
            params, own = self.model.params[f"layer_{i}"]["ffn"], thresholds.layers[i]
            own = {site: t for site, t in own.items() if site.startswith("ffn/")}
            errors.append(float(_ffn_error(x, params, own, config=self.model.config)))
        return errors


def _nll(logits: Float[Array, "T V"], ids: np.ndarray) -> float:
    return float(measure.nll(logits[:-1], jnp.asarray(ids[1:])).mean())


def _looked(logits: Array, seen: list, layers: Any) -> tuple:
    """Returns logits [T V], and of each layer the zeros' share by site, the gate's rates and the unions."""
    if not layers:
        return (logits[0],)
    zeros, rates, union = [], [], []
    for layer, found in zip(layers, seen, strict=True):
        kept = {site: threshold(found[site][0]) != 0 for site, threshold in layer.items()}
        zeros.append({site: 1 - jnp.mean(x) for site, x in kept.items()})
        gate = kept.get(Site.FFN_GATE, kept.get(Site.DOWN_IN))
        rates.append(gate.mean(0))
        parts = [gate[: len(gate) // b * b].reshape(b, -1, gate.shape[1]) for b in _BATCHES]
        union.append(jnp.stack([x.any(0).mean() for x in parts]))
    return logits[0], zeros, jnp.stack(rates), jnp.stack(union)


def _overall(zeros: list[Mapping[Site, float]], config: ModelConfig) -> float:
    """Returns the share of weights at sparse sites that is not read."""
    weights = {site: site.rows(config) * site.row_weights(config) for site in zeros[0]}
    part = sum(float(layer[site]) * n for layer in zeros for site, n in weights.items())
    return part / (len(zeros) * sum(weights.values()))


def _ffn_inputs(logits: Array, seen: list) -> list[Array]:
    return [found["ffn/gate/in"] for found in seen]


@functools.partial(jax.jit, static_argnames="config")
def _ffn_error(x: Array, params: Any, thresholds: Any, *, config: ModelConfig) -> Float[Array, ""]:
    tree: dict = {}
    for site, threshold in thresholds.items():
        *parents, leaf = site.split("/")[1:]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = threshold
    block = FeedForward(config)
    dense, sparse = (block.apply({"params": params, "thresholds": t}, x) for t in ({}, tree))
    return jnp.linalg.norm(sparse - dense) / jnp.linalg.norm(dense)
