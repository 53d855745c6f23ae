"""Makes a random model as sparse as a real one, and times its decode steps.

The channels of a real model's gate live at very different rates, and neighbouring ones do not live together;
its tokens share channels. A row of `chess quality` says which rates (`rates`) its method leaves. Here every
layer's channels get those rates in random order: a channel's threshold is the quantile of the layer's |gate|
that this rate asks for, found on random tokens after a random full cache. Inputs of projections have one
threshold per layer, as theirs do. What steps then leave out is measured by steps from the same state.
"""

import functools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import kvjax
from experiments import decode_model
from experiments.cases import prompts
from experiments.chelsea_steps import filled
from kvjax import measure, states
from kvjax.cache import KV
from kvjax.calibrate import activations
from kvjax.method import CacheMethod
from kvjax.methods import layers
from kvjax.methods.full import Full
from kvjax.methods.kivi import KIVI
from kvjax.model import Model, fingerprint
from kvjax.states import State
from kvjax.thresholds import ActivationSparsity, Site, Threshold, Thresholds
from pallas_kernels import dispatch

__all__ = ["skipped_bytes", "state_of", "synthetic", "timed"]

_TOKENS = 64  # random ones, that thresholds are found on
_STEPS = 8  # whose zeros are counted


def synthetic(
    model: Model, method: ActivationSparsity, rates: np.ndarray | None, tokens: int, seed: int
) -> Thresholds:
    """Returns thresholds with which a random model is as sparse as the method asks.

    rates: quantiles of how often the channels of a real gate live; None for a method without a gate.
    tokens: of the cache before those that thresholds are found on.
    """
    ids = prompts(model, 1, _TOKENS, seed)
    config, rng = model.config, np.random.default_rng(seed)
    tokens = min(tokens, config.context_length - _TOKENS)
    state = state_of(model, Full(), 1, tokens, tokens + _TOKENS, seed)
    lives = {}
    if rates is not None:
        at = np.linspace(0, 1, config.ffn_width)
        each = np.interp(at, np.linspace(0, 1, len(rates)), rates)
        lives = {Site.FFN_GATE: np.stack([rng.permutation(each) for _ in range(config.n_layers)])}
    plain = np.full((config.n_layers, 1), method.sparsity)
    shares = {site: jnp.asarray(1 - lives[site] if site in lives else plain) for site in Site}
    levels = activations.run(model, ids, _quantiles, shares, state=state)
    rows = [{site: _threshold(levels[site][i]) for site in method.sites} for i in range(config.n_layers)]
    return Thresholds(method, rows, fingerprint(model))


def _threshold(levels: Array) -> Threshold:
    """Returns that of one level, or of a level for each channel."""
    if levels.shape[0] == 1:
        return Threshold(levels[0])
    return Threshold(jnp.float32(1), 1 / jnp.maximum(levels, jnp.finfo(jnp.float32).tiny))


def _quantiles(logits: Array, seen: list, shares: Mapping[Site, Array]) -> dict[Site, Array]:
    """Returns the quantiles of each site's magnitudes, [L N]."""
    return {
        site: jnp.stack(
            [
                jnp.quantile(jnp.abs(found[site]).astype(jnp.float32).reshape(-1), share[i])
                for i, found in enumerate(seen)
            ]
        )
        for site, share in shares.items()
    }


def skipped_bytes(
    model: Model, thresholds: Thresholds, method: CacheMethod, state: State, seed: int
) -> tuple[float, dict[str, float]]:
    """Returns the bytes of weights that a step after a state does not read, and each site's share of zeros.

    A channel is read if a row of the batch needs it: of sites with zeros, those of all rows.
    """
    sparse, config, total = thresholds.apply(model), model.config, 0.0
    sums = dict.fromkeys(thresholds.method.sites, 0.0)
    for i in range(_STEPS):
        ids = prompts(model, state[0].seen.shape[0], 1, seed + i)
        layers = tuple(thresholds.layers)
        zeros = activations.run(sparse, ids, _zeros, layers, method=method, state=state)
        for site in sums:
            sums[site] += sum(float(layer[site]) for layer in zeros) / _STEPS
    for site, share in sums.items():
        total += share * site.rows(config) * site.row_weights(config) * _weight_bytes(model)
    return total, {site.name: share / config.n_layers for site, share in sums.items()}


def _weight_bytes(model: Model) -> int:
    return model.params["layer_0"]["ffn"]["down"]["kernel"].dtype.itemsize


def _zeros(logits: Array, seen: list, layers: tuple) -> list[dict[Site, Array]]:
    """Returns the share of channels that no row needs, mean over tokens."""
    return [
        {site: 1 - jnp.mean(jnp.any(t(found[site]) != 0, axis=0)) for site, t in layer.items()}
        for layer, found in zip(layers, seen, strict=True)
    ]


def state_of(model: Model, method: CacheMethod, batch: int, seen: int, total: int, seed: int) -> State:
    """Returns a state for `total` tokens as if `seen` random ones had been read."""
    if not isinstance(method, KIVI):
        return filled(model, method, batch, seen, total, seed)
    layer = layers(model.config)[0]
    q = jnp.zeros((batch, 1, layer.n_kv_heads, layer.group, layer.head_dim), model.dtype)  # is not looked at
    left = list(decode_model.occupied(states.init_state(model, method, batch, total), seen, seed))[::-1]
    done = []
    while left:  # one layer at a time exists twice
        done.append(_compressed(left.pop(), q, jnp.zeros((batch, 1), jnp.int32), method=method))
    return tuple(done)


@functools.partial(jax.jit, static_argnames="method")
def _compressed(kv: KV, q: Array, pos: Array, *, method: CacheMethod) -> KV:
    return method.compress(kv, q, pos)


def timed(model: Model, method: CacheMethod, state: State, steps: int, samples: int) -> dict[str, Any]:
    """Decodes greedily, `steps` a call; the first call compiles. Returns the median µs of a step.

    Raises:
        RuntimeError: where logits are not finite.
    """
    batch = state[0].seen.shape[0]
    logits = jnp.zeros((batch, model.config.vocab_size), jnp.float32)
    forced, times = np.full((batch, steps), -1, np.int32), []
    n_bytes = measure.nbytes(state)
    with dispatch.watch() as taken:
        for _ in range(samples + 1):
            start = time.perf_counter()
            _, logits, state, _ = jax.block_until_ready(kvjax.decode(model, logits, state, method, forced))
            times.append((time.perf_counter() - start) / steps * 1e6)
    if not bool(jnp.isfinite(logits).all()):
        raise RuntimeError("the steps that were timed went wrong: their logits are not finite")
    return {
        "impl": dict(taken), "step_us": statistics.median(times[1:]), "samples_us": times[1:],
        "state_bytes": n_bytes,
    }  # fmt: skip
