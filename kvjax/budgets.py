"""Calibrates a budget for each KV head: few heads need most of the slots.

Every head of every layer takes part in one ranking of merges over a few documents. Heads whose keys differ,
those that copy, are left with many slots, the others with few; no attention is looked at. A head's share
is what it is left with, relative to the mean.

Source: ours, inside the frame of Chelsea (arXiv 2506.11418); figures in docs/methods/chelsea.md.
"""

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import cache, clustering, replay
from kvjax.cache import KV
from kvjax.clustering import Matching
from kvjax.loop import State
from kvjax.methods.chelsea import Chelsea
from kvjax.methods.full import Full
from kvjax.model import Model

__all__ = ["Shares", "calibrate", "fingerprint", "load", "pool", "save"]

_MULTIPLE = 32  # slots
_MOST = 64  # passes


@dataclass(frozen=True)
class Shares:
    """What each KV head of a model needs, relative to the mean, [L K]; layers with a window have 0.

    Args:
        model: the fingerprint of the model.
        keep: the share of all slots that was kept.
        context: tokens per document.
    """

    shares: tuple[tuple[float, ...], ...]
    model: str
    keep: float
    context: int

    def table(self, budget: int, method: Chelsea | None = None) -> tuple[tuple[int, ...], ...]:
        """Returns budgets [L K] in multiples of 32 slots whose mean is at most `budget`, and nearly that.

        method: for the slots that a head needs at least; None takes Chelsea's defaults.

        Raises:
            ValueError: where the mean is below that.
        """
        least = _up((method or Chelsea(budget)).least)
        shares = np.asarray(self.shares)
        total = budget * np.count_nonzero(shares)
        if least > budget:
            raise ValueError(f"a mean budget is at least the {least} slots that each head needs, got {budget=}")

        def at(scale: float) -> np.ndarray:
            return np.maximum(_MULTIPLE * np.round(scale * shares / _MULTIPLE), least).astype(int)

        low, high = 0.0, 2.0 * budget * max(1.0, 1 / shares[shares > 0].min())
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle)[shares > 0].sum() <= total else (low, middle)
        return tuple(tuple(row) for row in at(low).tolist())


def calibrate(
    model: Model, documents: Int[np.ndarray, "N T"], keep: float, method: Chelsea | None = None
) -> Shares:
    """Finds the shares of a model's heads.

    Args:
        documents: token ids; about six documents of the length that is to be served do.
        keep: the share of slots that pooled merges leave.
        method: for how slots are matched; None takes Chelsea's defaults.

    Raises:
        ValueError: for a share that is none, or documents too short to reach it.
    """
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
    """Merges a state's slots with all heads of all layers in one ranking, until a share `keep` is left.

    This one shot is for analysis: each prompt gets budgets of its own. Capacities stay as they are. Layers
    with a window are left alone.

    Raises:
        ValueError: for a share that is none, or one that cannot be reached.
    """
    if not 0 < keep < 1:
        raise ValueError(f"a share is between 0 and 1, got {keep=}")
    layers = [i for i, kv in enumerate(state) if kv.layer.window is None]
    parts = {i: (state[i], state[i].mass) for i in layers}
    least = how.n_sinks + how.n_recent + how.stride
    first = _total(parts)
    goal = np.ceil(keep * first)
    for i in range(1, _MOST + 1):
        now = _total(parts)
        if (now <= goal).all():
            break
        found = {j: np.asarray(_similarity(*parts[j], how=how)) for j in layers}
        n_merges = now - np.maximum(goal, np.ceil(first * how.stride ** (-i / 2)))
        ranked = -np.sort(-np.concatenate([found[j] for j in layers], axis=1), axis=1)
        at = np.clip(n_merges.astype(int) - 1, 0, ranked.shape[1] - 1)
        last = np.where(n_merges > 0, np.take_along_axis(ranked, at[:, None], 1)[:, 0], np.inf)
        for j in layers:
            parts[j] = _merge(*parts[j], jnp.asarray(last), least=least, how=how)
    else:
        raise ValueError(
            f"merges reach the share, got {keep=} of {first.astype(int).tolist()} slots: raise it, "
            "or take longer documents"
        )
    return tuple(parts[i][0] if i in parts else kv for i, kv in enumerate(state))


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
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"budgets are a file of `kvjax calibrate budgets`, got {str(path)!r} ({error!r}): make it anew"
        ) from error
    shape = (model.config.n_layers, model.config.n_kv_heads)
    if np.shape(shares.shares) != shape or shares.model != fingerprint(model):
        raise ValueError(
            f"budgets belong to one model, got those of another in {str(path)!r}, which are "
            f"{np.shape(shares.shares)} for {shape}: calibrate {model.name}"
        )
    return shares


def fingerprint(model: Model) -> str:
    """Returns a name for a model's configuration and weights, the same in float32 and bfloat16.

    Of the weights it takes the vectors: norms and biases.
    """
    digest = hashlib.sha256(repr(model.config).encode())
    for path, x in sorted(jax.tree_util.tree_leaves_with_path(model.params), key=lambda leaf: str(leaf[0])):
        if x.ndim == 1:
            digest.update(f"{path}".encode())
            digest.update(np.asarray(x.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:16]


def _total(parts: dict[int, tuple[KV, Array]]) -> Float[np.ndarray, "B"]:
    return np.sum([np.asarray(cache.count(kv)).sum(1) for kv, _ in parts.values()], axis=0)


@functools.partial(jax.jit, static_argnames="how")
def _similarity(kv: KV, n: Array, *, how: Matching) -> Float[Array, "B R"]:
    return clustering.matches(kv, n, how)[1]


@functools.partial(jax.jit, static_argnames=("least", "how"))
def _merge(kv: KV, n: Array, last: Float[Array, "B"], *, least: int, how: Matching) -> tuple[KV, Any]:
    """Merges what is at least as similar as `last`."""
    similarity = clustering.matches(kv, n, how)[1] >= last[:, None]
    heads = [cache.view(similarity, run).sum(-1) for run in cache.runs(kv.slots)]
    count = cache.count(kv)
    target = jnp.maximum(count - jnp.concatenate(heads, axis=1), jnp.minimum(count, least))
    return clustering.merge(kv, n, target, [1] * len(kv.slots), kv.slots, how)


def _up(n: int) -> int:
    return math.ceil(n / _MULTIPLE) * _MULTIPLE
