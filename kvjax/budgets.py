"""Calibrates a budget for each KV head: few heads need most of the slots.

Every head of every layer takes part in one ranking of merges over a few documents. Heads whose keys differ,
those that copy, are left with many slots, the others with few; no attention is looked at. A head's share
is what it is left with, relative to the mean.

Source: ours, inside the frame of Chelsea (arXiv 2506.11418); figures in docs/methods/chelsea.md.
"""

import functools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import cache, clustering, merging, replay
from kvjax.cache import KV
from kvjax.clustering import Clusters, Matching
from kvjax.methods.chelsea import Chelsea
from kvjax.methods.full import Full
from kvjax.model import Model, fingerprint
from kvjax.states import State

__all__ = ["Shares", "calibrate", "load", "pool", "save", "schedule"]

_MULTIPLE = 32  # slots
_MOST = 64  # passes


@dataclass(frozen=True)
class Shares:
    """What each KV head of a model needs, relative to the mean, [L K]; layers with a window have 0.

    Args:
        model: the fingerprint of the model.
        keep: the share of all slots that was kept.
        context: tokens per document.
        losses: KL to the full cache in nats, before refinement and after each round of it; none without.
    """

    shares: tuple[tuple[float, ...], ...]
    model: str
    keep: float
    context: int
    losses: tuple[float, ...] = ()

    def table(self, budget: int, least: int = 1) -> tuple[tuple[int, ...], ...]:
        """Returns budgets [L K] in multiples of 32 slots whose mean is at most `budget`, and nearly that.

        A share means the same at every length: no head gets more than the tokens it was calibrated for would
        fill, budget / keep.

        least: slots that each head needs, such as `Chelsea.least`.

        Raises:
            ValueError: where the mean is below that.
        """
        least, shares = -(-least // _MULTIPLE) * _MULTIPLE, np.asarray(self.shares)
        total, most = (
            budget * np.count_nonzero(shares),
            max(least, budget / self.keep // _MULTIPLE * _MULTIPLE),
        )
        if least > budget:
            raise ValueError(
                f"a mean budget is at least what each head needs, {least} slots in multiples of {_MULTIPLE}, "
                f"got {budget=}"
            )

        def at(scale: float) -> np.ndarray:
            rounded = _MULTIPLE * np.round(scale * shares / _MULTIPLE)
            return np.maximum(np.minimum(rounded, most), least).astype(int)

        low, high = 0.0, 2.0 * budget * max(1.0, 1 / shares[shares > 0].min())
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle)[shares > 0].sum() <= total else (low, middle)
        return tuple(tuple(row) for row in at(low).tolist())


def schedule(budget: int, n_layers: int, first: float) -> tuple[int, ...]:
    """Returns a budget per layer on a straight line, from first·budget to (2 - first)·budget.

    Raises:
        ValueError: where a layer would get nothing.

    Example:
        >>> schedule(100, 3, first=1.5)
        (150, 100, 50)
    """
    if not 0 < first < 2:
        raise ValueError(f"every layer gets a budget, got {first=}: it is above 0 and below 2")
    return tuple(int(x) for x in np.round(np.linspace(first, 2 - first, n_layers) * budget))


def calibrate(
    model: Model, documents: Int[np.ndarray, "N T"], keep: float, method: Chelsea | None = None
) -> Shares:
    """Finds the shares of a model's heads.

    Args:
        documents: token ids; about six documents of the length that is to be served do.
        keep: the share of slots that pooled merges leave.
        method: for how slots are matched; None takes Chelsea's defaults.

    Raises:
        ValueError: for a share that is none, documents too short to reach it, or a model whose layers all
            have windows.
    """
    if all(model.config.layer_windows):
        raise ValueError(f"layers with a window take no budget, got nothing but those in {model.name}")
    method = method or Chelsea(documents.shape[1])
    left = []
    for ids in documents:
        _, pos, records = replay.record(model, [ids.tolist()], room=0)
        state = pool(replay.replay(model, Full(), records, pos, room=0), keep, method.matching)
        left.append([np.zeros(0) if kv.layer.window else np.asarray(cache.count(kv))[0] for kv in state])
    mean = [np.mean(rows, axis=0) for rows in zip(*left, strict=True)]
    whole = np.concatenate(mean).mean()
    shares = [m / whole if m.size else np.zeros(model.config.n_kv_heads) for m in mean]
    return Shares(
        tuple(tuple(map(float, row)) for row in np.round(shares, 4)),
        fingerprint(model),
        keep,
        documents.shape[1],
    )


def pool(state: State, keep: float, how: Matching) -> State:
    """Merges slots with all heads of all layers in one ranking, until at most a share `keep` is left.

    This one shot is for analysis: each prompt gets budgets of its own. Capacities stay as they are. Layers
    with a window are left alone.

    Raises:
        ValueError: for a share that is none, or one that cannot be reached.
    """
    if not 0 < keep < 1:
        raise ValueError(f"a share is between 0 and 1, got {keep=}")
    layers = {i: kv for i, kv in enumerate(state) if kv.layer.window is None}
    parts = {i: _begin(kv, how=how) for i, kv in layers.items()}
    first = np.sum([np.asarray(cache.count(kv)).sum(1) for kv in layers.values()], axis=0)
    goal = np.ceil(keep * first)
    for i in range(1, _MOST + 1):
        now = np.sum([np.asarray(part.root >= 0).sum(1) for part in parts.values()], axis=0)
        if (now <= goal).all():
            break
        found = {j: np.asarray(_similarity(parts[j], slots=kv.slots, how=how)) for j, kv in layers.items()}
        n_merges = now - np.maximum(goal, np.ceil(first * how.stride ** (-i / 2)))
        ranked = -np.sort(-np.concatenate(list(found.values()), axis=1), axis=1)
        at = np.clip(n_merges.astype(int) - 1, 0, ranked.shape[1] - 1)
        last = np.where(n_merges > 0, np.take_along_axis(ranked, at[:, None], 1)[:, 0], np.inf)
        for j, kv in layers.items():
            parts[j] = _merge(parts[j], jnp.asarray(last), slots=kv.slots, how=how)
    else:
        raise ValueError(
            f"merges reach the share, got {keep=} of {first.astype(int).tolist()} slots: raise it, "
            "or take longer documents"
        )
    return tuple(_finish(kv, parts[i], how=how) if i in parts else kv for i, kv in enumerate(state))


def save(shares: Shares, path: Path | str) -> None:
    """Writes the shares as JSON."""
    Path(path).write_text(json.dumps(asdict(shares), indent=1) + "\n", encoding="utf-8")


def load(path: Path | str, model: Model) -> Shares:
    """Reads shares.

    Raises:
        ValueError: for a file that holds none, or those of another model.
        OSError: for a file that cannot be read.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        shares = Shares(
            tuple(tuple(map(float, row)) for row in data["shares"]),
            str(data["model"]),
            float(data["keep"]),
            int(data["context"]),
            tuple(map(float, data.get("losses", ()))),
        )
        if not all(math.isfinite(x) and x >= 0 for row in shares.shares for x in row):
            raise ValueError("a share is a number, 0 or more")
        shape = np.shape(shares.shares)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"budgets are a file of `kvjax calibrate budgets`, got {str(path)!r} ({error!r}): make it anew"
        ) from error
    wanted = (model.config.n_layers, model.config.n_kv_heads)
    if shape != wanted or shares.model != fingerprint(model):
        raise ValueError(
            f"budgets belong to one model, got those of another in {str(path)!r}, which are "
            f"{shape} for {wanted}: calibrate {model.name}"
        )
    return shares


@functools.partial(jax.jit, static_argnames="how")
def _begin(kv: KV, *, how: Matching) -> Clusters:
    return clustering.begin(kv, kv.mass, how)


@functools.partial(jax.jit, static_argnames=("slots", "how"))
def _similarity(clusters: Clusters, *, slots: tuple[int, ...], how: Matching) -> Float[Array, "B R"]:
    return clustering.matches(clusters, slots, how)[1]


@functools.partial(jax.jit, static_argnames=("slots", "how"))
def _merge(clusters: Clusters, last: Float[Array, "B"], *, slots: tuple[int, ...], how: Matching) -> Clusters:
    """Merges what is at least as similar as `last`."""
    go = clustering.matches(clusters, slots, how)[1] >= last[:, None]
    left = merging.dense((clusters.root >= 0) & ~go, slots, False).sum(-1)
    return clustering.merge(clusters, left, slots, [1] * len(slots), how)


@functools.partial(jax.jit, static_argnames="how")
def _finish(kv: KV, clusters: Clusters, *, how: Matching) -> KV:
    return clustering.finish(kv, kv.mass, clusters, [1] * len(kv.slots), kv.slots, how)[0]
