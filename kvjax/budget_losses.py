"""Refines the budgets of KV heads by what a slot is worth: the loss that heads bring when they have fewer.

    KL(full ‖ clustered) over the ends of a few documents, at budgets b
    each head in turn gets 3/4 of its slots:  δ = how much the KL rises,  worth = δ / (b/4) a slot
    b ← b·(worth / its geometric mean)^½, halved or doubled at most; later rounds take ¼, ⅙, ... for ½

Where every slot is worth the same, no slot is better elsewhere; the table of least KL is kept. Pooled merges
(`kvjax.budgets`) are where it starts: they see keys alone, and this sees what the model makes of them.

Source: ours, inside the frame of Chelsea (arXiv 2506.11418).
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console
from rich.progress import Progress

from kvjax import cache, clustering, measure, reading, replay
from kvjax.budgets import Shares
from kvjax.cache import KV
from kvjax.clustering import Matching
from kvjax.methods.chelsea import Chelsea
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.states import State

__all__ = ["N_REST", "refine"]

N_REST = 256  # tokens at a document's end that are predicted
_LESS = 0.75  # of a head's slots, while it is judged
_LEAST_WORTH = 0.05  # of the mean: heads that seem to lose nothing, or to gain
_PIECE = 64  # tokens read at once


def refine(
    model: Model,
    documents: Int[np.ndarray, "N T"],
    shares: Shares,
    n_rounds: int,
    method: Chelsea | None = None,
    *,
    n_rest: int = N_REST,
) -> Shares:
    """Moves slots to the heads that lose most without them. Shows its progress.

    Args:
        documents: token ids; the last n_rest tokens of each are what is predicted, the others are clustered.
        shares: where to begin. Its `keep` is of these documents.
        n_rounds: each reads all documents once for every head.
        method: for how slots are matched; None takes Chelsea's defaults.

    Returns: the shares of least KL, with the KL before and after each round; at best those given.

    Raises:
        ValueError: for rounds or documents that are too few or too short.

    Cost: a round reads N·n_rest tokens through the whole model once for each head, beside N states of T slots
    a head and the full cache's N·n_rest logits.
    """
    if n_rounds < 1 or not 0 < n_rest < documents.shape[1]:
        raise ValueError(
            f"refinement takes 1 round or more, and documents with an end, got {n_rounds=}, {n_rest=} of "
            f"{documents.shape[1]} tokens"
        )
    method = method or Chelsea(documents.shape[1])
    budget = round(shares.keep * (documents.shape[1] - n_rest))
    ends = _Ends.of(model, documents, n_rest, method.matching)
    judged = np.asarray(shares.shares) > 0
    tried = [(ends.loss(ends.clustered(_table(shares, budget, method))), shares)]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("Judging heads", total=n_rounds * judged.sum())
        for i in range(n_rounds):
            before, at = tried[-1]
            table = _table(at, budget, method)
            rise = ends.losses_with_less(table, judged, lambda: progress.advance(task)) - before
            at = replace(at, shares=_moved(table, rise, 0.5 / (i + 1)))
            tried.append((ends.loss(ends.clustered(_table(at, budget, method))), at))
    best = min(tried, key=lambda x: x[0])[1]
    return replace(best, losses=tuple(round(loss, 5) for loss, _ in tried))


def _table(shares: Shares, budget: int, method: Chelsea) -> Int[np.ndarray, "L K"]:
    return np.asarray(shares.table(budget, method.least))


def _moved(
    table: Int[np.ndarray, "L K"], rise: Float[np.ndarray, "L K"], power: float
) -> tuple[tuple[float, ...], ...]:
    """Returns shares that follow what a slot of each head is worth.

    rise: of the KL, when a head has less; NaN for those without a budget, whose share is 0.
    """
    judged = ~np.isnan(rise)
    worth = rise[judged] / ((1 - _LESS) * table[judged])
    worth = np.maximum(worth, _LEAST_WORTH * np.mean(np.maximum(worth, 0)) + 1e-30)
    factor = (worth / np.exp(np.mean(np.log(worth)))) ** power
    new = np.where(judged, table, 0).astype(float)
    new[judged] *= np.clip(factor, 0.5, 2.0)
    return tuple(tuple(map(float, row)) for row in np.round(new / new[judged].mean(), 4))


@dataclass(frozen=True)
class _Ends:
    """Documents in dense states, and what the full cache predicts at their ends."""

    model: Model
    state: State
    rest: Int[np.ndarray, "N R"]
    full: tuple[Float[Array, "N P V"], ...]
    how: Matching

    @classmethod
    def of(cls, model: Model, documents: np.ndarray, n_rest: int, how: Matching) -> "_Ends":
        """Reads documents densely."""
        prompts = [row[:-n_rest].tolist() for row in documents]
        _, pos, records = replay.record(model, prompts, room=n_rest)
        state = replay.replay(model, Full(), records, pos, room=n_rest)
        self = cls(model, state, documents[:, -n_rest:], (), how)
        return replace(self, full=tuple(self._logits(state)))

    def clustered(self, table: Int[np.ndarray, "L K"]) -> State:
        """Returns the states at these budgets. Capacities stay, so that all budgets share their programs."""
        return tuple(
            kv if kv.layer.window else _clustered(kv, jnp.asarray(row), how=self.how)
            for kv, row in zip(self.state, table, strict=True)
        )

    def with_less(self, state: State, table: Int[np.ndarray, "L K"], layer: int, head: int) -> State:
        """Returns clustered states in which one head has fewer slots."""
        row = table[layer].copy()
        row[head] = round(_LESS * row[head])
        kv = _clustered(self.state[layer], jnp.asarray(row), how=self.how)
        return (*state[:layer], kv, *state[layer + 1 :])

    def losses_with_less(
        self, table: Int[np.ndarray, "L K"], judged: Bool[np.ndarray, "L K"], each: Callable[[], None]
    ) -> Float[np.ndarray, "L K"]:
        """Returns for each judged head the loss where it alone has fewer slots; NaN for the others."""
        state, losses = self.clustered(table), np.full(table.shape, np.nan)
        for layer, head in np.argwhere(judged).tolist():
            losses[layer, head] = self.loss(self.with_less(state, table, layer, head))
            each()
        return losses

    def loss(self, state: State) -> float:
        """Returns the mean KL to the full cache, in nats per token."""
        pairs = zip(self.full, self._logits(state), strict=True)
        return float(sum(_kl(*pair) for pair in pairs)) / self.rest.size

    def _logits(self, state: State) -> Iterator[Array]:
        """Yields the logits after each token of the ends, in pieces. The states are kept."""
        state = jax.tree.map(jnp.copy, state)
        for start in range(0, self.rest.shape[1], _PIECE):
            part, state = reading.read(self.model, self.rest[:, start : start + _PIECE], Full(), state)
            yield part


@jax.jit
def _kl(full: Float[Array, "N P V"], other: Float[Array, "N P V"]) -> Float[Array, ""]:
    return measure.kl(full, other).sum()


@functools.partial(jax.jit, static_argnames="how")
def _clustered(kv: KV, goal: Int[Array, "K"], *, how: Matching) -> KV:
    """Clusters each head down to its goal, as `Chelsea` does, in a state of the same capacity."""
    first, least = cache.count(kv), how.n_sinks + how.n_recent + 1
    n_passes = len(clustering.plan(max(kv.slots), least, how))

    def one(i: Array, clusters: clustering.Clusters) -> clustering.Clusters:
        target = jnp.ceil(first * how.stride ** (-0.5 * (i + 1)) - 1e-3).astype(jnp.int32)
        return clustering.merge(clusters, jnp.maximum(goal, target), kv.slots, [1] * len(kv.slots), how)

    newest = jnp.maximum(how.n_recent, (how.recent * goal).astype(jnp.int32))
    clusters = jax.lax.fori_loop(0, n_passes, one, clustering.begin(kv, kv.mass, how, newest))
    return clustering.finish(kv, kv.mass, clusters, [1] * len(kv.slots), kv.slots, how)[0]
