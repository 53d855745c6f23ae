"""Learns thresholds by gradient steps: layers, sites and channels share one sparsity as the loss asks.

    soft     x·σ(log(|x|·w / level) / τ)                      τ falls from 0.5 to 0.05
    loss     KL(dense ‖ soft) of the next tokens, mean         and s, the soft sparsity, by weights not read
    step     Adam on ∇loss − λ·∇s,  λ = ∂loss/∂a / ∂s/∂a       a: one factor on all levels
             then all levels times the factor that brings s back to the target (a step of Newton's)

So no step changes the sparsity to first order, and none needs a multiplier that must be tuned. What is learnt
are the levels and, where channels are weighed, their weights. Levels of 0 stay.

Source: ours; the soft threshold is that of LTP (arXiv 2107.00910), section 3.3.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from rich.progress import Progress

from kvjax.calibrate import activations
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.models.config import ModelConfig
from kvjax.program import Program
from kvjax.states import init_state
from kvjax.thresholds import Site, Threshold, Thresholds, collection

__all__ = ["refine", "restored"]

_TOKENS, _ROWS = 512, 2  # of a step
_RATE = 0.03  # of Adam, on logarithms
_HOT, _COLD = 0.5, 0.05  # temperatures
_TINY = 1e-20


def refine(
    model: Model,
    documents: Int[np.ndarray, "N T"],
    thresholds: Thresholds,
    *,
    n_steps: int,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Returns the learnt levels and weights by name, for `restored`, and the curves.

    The first eighth of the pieces is held out. Curves: `kl` and `sparsity` [n_steps], soft, of what is learnt
    from; `held_out` [2]: the KL of hard thresholds, before and after, as they are.

    Raises:
        ValueError: for too few pieces of text to hold one out.
    """
    width = min(_TOKENS, documents.shape[1])
    pieces = documents[:, : documents.shape[1] // width * width].reshape(-1, width)
    n_held = max(1, len(pieces) // 8)
    if len(pieces) < n_held + _ROWS:
        raise ValueError(f"refinement needs {n_held + _ROWS} pieces of {width} tokens, got {len(pieces)}")
    held, pieces = pieces[:n_held], pieces[n_held:]
    target = jnp.float32(thresholds.method.sparsity)
    logs = [{str(site): _logs(t) for site, t in layer.items()} for layer in thresholds.layers]
    group = thresholds.method.group
    before = _held_out(model, held, _hard(logs, group))
    inner, curves = optax.adam(_RATE).init(logs), []
    order = np.random.default_rng(seed).integers(0, len(pieces), (n_steps, _ROWS))
    task = progress and progress.add_task("Refining", total=n_steps)
    for i, rows in enumerate(order):
        heat = jnp.float32(_HOT * (_COLD / _HOT) ** (i / max(1, n_steps - 1)))
        run = functools.partial(_step, model.variables, pieces[rows], _state(model, _ROWS, width))
        program = Program.of(model, Full())
        (logs, inner), seen = run((logs, inner), heat, target, program=program, group=group)
        curves.append(seen)
        if progress:
            progress.advance(task)
    found = {
        f"{i} {site} {name}": np.asarray(x)
        for i, layer in enumerate(logs)
        for site, t in layer.items()
        for name, x in t.items()
    }
    kl, sparsity = np.float32(curves).T
    after = _held_out(model, held, _hard(logs, group))
    return found | {"kl": kl, "sparsity": sparsity, "held_out": np.float32([before, after])}


def restored(thresholds: Thresholds, learnt: Mapping[str, np.ndarray]) -> Thresholds:
    """Returns thresholds with what was learnt in their place."""
    group = thresholds.method.group
    layers = []
    for i, layer in enumerate(thresholds.layers):
        logs = {site: {k: learnt[f"{i} {site} {k}"] for k in _logs(t)} for site, t in layer.items()}
        layers.append({site: _threshold(x, group) for site, x in logs.items()})
    return dataclasses.replace(thresholds, layers=layers)


def _logs(t: Threshold) -> dict[str, Array]:
    """Returns what is learnt of a threshold."""
    found = {"level": jnp.log(t.level + _TINY)}
    return found if t.weight is None else found | {"weight": jnp.log(t.weight + _TINY)}


def _threshold(logs: Mapping[str, Any], group: int, heat: Array | None = None) -> Threshold:
    weight = jnp.exp(logs["weight"]) if "weight" in logs else None
    return Threshold(jnp.exp(jnp.asarray(logs["level"])), weight, heat, group)


def _hard(logs: list, group: int) -> dict:
    """Returns the variables of hard thresholds."""
    return collection([{Site(site): _threshold(x, group) for site, x in layer.items()} for layer in logs])


def _state(model: Model, rows: int, width: int) -> Any:
    return init_state(model, Full(), rows, width, width)


@functools.partial(jax.jit, static_argnames=("program", "group"))
def _step(variables, ids, state, learner, heat, target, *, program: Program, group: int):
    """Takes one step of a learner, which is what is learnt and the optimiser's state.

    Returns: the new one, and (loss, sparsity) before the step.
    """
    logs, inner = learner
    pos = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    dense = activations.traced(variables, ids, pos, state, program, False)[0]

    def both(logs: list) -> Float[Array, "2"]:
        layers = [{Site(s): _threshold(x, group, heat) for s, x in layer.items()} for layer in logs]
        sparse = {**variables, "thresholds": collection(layers)}
        logits, seen = activations.traced(sparse, ids, pos, state, program, False)
        return jnp.stack([_kl(dense, logits), _sparsity(layers, seen, program.config)])

    seen, pull = jax.vjp(both, logs)
    (of_loss,), (of_sparsity,) = pull(jnp.array([1.0, 0.0])), pull(jnp.array([0.0, 1.0]))
    slope = _along(of_sparsity)
    price = _along(of_loss) / slope
    change, inner = optax.adam(_RATE).update(
        jax.tree.map(lambda a, b: a - price * b, of_loss, of_sparsity), inner
    )
    logs = optax.apply_updates(logs, change)
    shift = jnp.clip((target - seen[1]) / slope, -0.3, 0.3)
    logs = [{s: {**t, "level": t["level"] + shift} for s, t in layer.items()} for layer in logs]
    return (logs, inner), seen


def _along(gradient: list) -> Float[Array, ""]:
    """Returns the change with the logarithm of a factor on all levels."""
    return sum(t["level"] for layer in gradient for t in layer.values())


def _kl(dense: Float[Array, "B T V"], logits: Float[Array, "B T V"]) -> Float[Array, ""]:
    p, q = jax.nn.log_softmax(dense), jax.nn.log_softmax(logits)
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))


def _sparsity(layers: list, seen: list, config: ModelConfig) -> Float[Array, ""]:
    """Returns the soft share of weights that are not read, of those at sites."""
    total, part = 0, 0.0
    for layer, values in zip(layers, seen, strict=True):
        for site, t in layer.items():
            n = site.rows(config) * site.row_weights(config)
            total, part = total + n, part + n * (1 - t.soft(t.scores(values[site])).mean())
    return part / total


def _held_out(model: Model, pieces: np.ndarray, thresholds: dict) -> float:
    """Returns the KL of hard thresholds to the dense model."""
    sparse = dataclasses.replace(model, thresholds=thresholds)
    losses = []
    for row in pieces:
        logits = [activations.run(m, row[None], _logits, last_only=False) for m in (model, sparse)]
        losses.append(float(jax.jit(_kl)(*logits)))
    return float(np.mean(losses))


def _logits(logits: Array, seen: list) -> Array:
    return logits
