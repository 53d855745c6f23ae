"""Reads documents densely and counts what activations are at the sites of all layers."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.calibrate import quantiles
from kvjax.method import CacheMethod
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.program import Program
from kvjax.states import State, init_state
from kvjax.thresholds import Threshold

__all__ = ["counts", "run", "traced", "up_sums"]


def run(
    model: Model,
    ids: Int[np.ndarray, "B T"],
    look: Callable[..., Any],
    *arrays: Any,
    last_only: bool = True,
    method: CacheMethod = Full(),  # noqa: B008  frozen
    state: State | None = None,
) -> Any:
    """Reads documents in one call and returns look(logits, activations, *arrays).

    activations: of each layer, by the names of sites; and "ffn/up/out", the product with W_up.
    look: a function of a module, since equal ones compile once.
    state: what the tokens follow, of this method; it is kept as it is. None for nothing.
    """
    state = init_state(model, method, *ids.shape, ids.shape[1]) if state is None else state
    pos = np.asarray(state[0].seen)[:, None] + np.arange(ids.shape[1], dtype=np.int32)
    program = Program.of(model, method)
    return _run(model.variables, ids, pos, state, arrays, program=program, look=look, last_only=last_only)


@functools.partial(jax.jit, static_argnames=("program", "look", "last_only"))
def _run(variables, ids, pos, state, arrays, *, program: Program, look: Callable, last_only: bool):
    return look(*traced(variables, ids, pos, state, program, last_only), *arrays)


def traced(
    variables: Any, ids: Array, pos: Array, state: Any, program: Program, last_only: bool
) -> tuple[Float[Array, "B T V"], list[dict[str, Array]]]:
    """Returns logits and activations, as `run` gives them on."""
    options = {"last_only": last_only, "mutable": ["activations"]}
    (logits, _, _), seen = program.run(variables, ids, pos, state, **options)
    found = seen["activations"]
    return logits, [_named(found[f"layer_{i}"]) for i in range(program.config.n_layers)]


def _named(tree: Mapping[str, Any]) -> dict[str, Array]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path if hasattr(key, "key")): x for path, x in paths}


def up_sums(logits: Array, activations: list[dict[str, Array]]) -> dict[str, Float[Array, "L F"]]:
    """Sums |a_up| and a_up² of each channel over tokens."""
    ups = jnp.stack([layer["ffn/up/out"].astype(jnp.float32) for layer in activations])
    return {"mean": jnp.abs(ups).sum((1, 2)), "rms": (ups * ups).sum((1, 2))}


def counts(
    logits: Array,
    activations: list[dict[str, Array]],
    probes: Sequence[Mapping[str, Threshold]],
    bins: Sequence[Mapping[str, Array]] | None,
) -> dict[str, Int[Array, "..."]]:
    """Counts the scores of each layer's probes, coarsely or within bins, see `quantiles`.

    probes: by name, whose first word is a site. The counts of layer 3 have the name "3 " and the probe's.
    """
    found = {}
    for i, layer in enumerate(probes):
        for probe, threshold in layer.items():
            scores = threshold.scores(activations[i][probe.split()[0]])
            name = f"{i} {probe}"
            found[name] = quantiles.coarse(scores) if bins is None else quantiles.fine(scores, bins[i][probe])
    return found
