"""Takes decode steps, many in one compiled program whose state is donated and updated in place."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax import cache, disk, tiers
from kvjax.method import CacheMethod
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.program import Program, compressed
from kvjax.sampling import Limits, Sampling, sample
from kvjax.shapes import Ids
from kvjax.states import State, settle

__all__ = ["decode", "decode_step"]


def decode_step(
    model: Model,
    ids: Ids,
    state: State,
    method: CacheMethod = Full(),  # noqa: B008
) -> tuple[Float[Array, "B V"], State]:
    """Appends one token per row and returns the logits of the next. The given state is consumed.

    A row with id -1 is left as it is.

    Raises:
        ValueError: for ids outside the vocabulary, where they lie on the host.

    Example:
        >>> import kvjax
        >>> model = kvjax.load("smollm2-135m")
        >>> ids = kvjax.pad([model.tokenizer.encode("The capital of France is")])
        >>> logits, state = kvjax.prefill(model, ids, room=2)
        >>> logits, state = kvjax.decode_step(model, logits.argmax(-1), state)
        >>> model.tokenizer.decode(logits.argmax(-1).tolist())
        '.'
    """
    disk.check(state)
    if not isinstance(ids, jax.Array):
        _check_ids(model, np.asarray(ids))
    ids = jnp.asarray(ids)[:, None]
    pos = jnp.where(ids >= 0, state[0].seen[:, None], -1)
    program = Program.of(model, method)
    logits, state = _step(model.variables, ids, pos, state, program=program)
    return logits, settle(state, program.methods)


def _check_ids(model: Model, ids: np.ndarray) -> None:
    if (ids >= model.config.vocab_size).any():
        raise ValueError(f"token ids are below {model.config.vocab_size}, got {int(ids.max())}")


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def _step(variables, ids, pos, state, *, program: Program):
    """Runs one decode step."""
    logits, state = _advance(variables, ids, pos, state, program)
    return logits[:, 0], state


def _advance(variables: Any, ids: Array, pos: Array, state: State, program: Program) -> tuple[Array, State]:
    """Takes a decode step. Methods that have work seldom compress after it, all layers together."""
    logits, state, records = program.run(variables, ids, pos, state, compress=True)
    due = [d for m, kv in zip(program.methods, state, strict=True) if (d := m.due(kv)) is not None]
    if not due:
        return logits, state

    def compress(state: State) -> State:
        """Compresses layer by layer: each in a loop of its own, so that one at a time exists twice."""
        new = []
        for kv, record, method in zip(state, records, program.methods, strict=True):
            change = functools.partial(compressed, q=record.q, pos=pos, method=method, mesh=program.mesh)
            late = method.due(kv)
            new.append(kv if late is None else cache.when(jnp.any(late), change, kv))
        return tuple(new)

    flag = jnp.any(functools.reduce(jnp.logical_or, due))  # one reduction for all layers
    return logits, cache.when(flag, compress, state)


def decode(
    model: Model,
    logits: Float[Array, "B V"],
    state: State,
    method: CacheMethod,
    forced: Int[np.ndarray, "B N"],
    *,
    steps: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008
    keep_logits: bool = False,
) -> tuple[Int[Array, "B N"], Float[Array, "B V"], State, Float[Array, "B N V"] | None]:
    """Runs up to N decode steps in one program.

    Args:
        logits: for the first token, from `prefill` or an earlier `decode`.
        forced: tokens to take instead of drawn ones, -1 = draw, -2 = the row has ended.
        steps: at most this many of the N steps (a run-time number).
        sampling: how tokens are drawn; a row that takes a stop token ends there. Ended rows give
            -1 and change no state.
        keep_logits: also return the logits that each token was drawn from.

    Returns: tokens, the next logits, the state, and the logits if kept.

    Raises:
        ValueError: for forced ids outside the vocabulary.

    Example:
        >>> import kvjax
        >>> model, method = kvjax.load("smollm2-135m"), kvjax.METHODS["full"]()
        >>> ids = kvjax.pad([model.tokenizer.encode("The capital of France is")])
        >>> logits, state = kvjax.prefill(model, ids, method, room=2)
        >>> tokens, logits, state, _ = kvjax.decode(model, logits, state, method, forced=np.full((1, 2), -1))
        >>> model.tokenizer.decode(tokens[0].tolist())
        ' Paris.'
    """
    forced = np.asarray(forced, np.int32)
    _check_ids(model, forced)
    steps = forced.shape[1] if steps is None else min(steps, forced.shape[1])
    program = Program.of(model, method)
    options = {"program": program, "keep_logits": keep_logits}
    run = functools.partial(_decode, model.variables, limits=sampling.limits(), **options)
    if all(kv.tier is None for kv in state):
        return run(logits, state, forced, np.int32(steps))
    return _decode_parts(run, program.methods, logits, state, forced, steps, sampling.stop or ())


def _decode_parts(
    run: Callable[..., tuple],
    methods: Sequence[CacheMethod],
    logits: Array,
    state: State,
    forced: np.ndarray,
    steps: int,
    stop: Sequence[int],
) -> tuple:
    """Decodes by programs of as many steps as are staged, and moves their rows to the host in between."""
    disk.check(state)
    tokens, kept, ended = [], [], np.zeros((len(forced), 1), bool)
    for start in range(0, forced.shape[1], tiers.STEPS):
        part = np.where(ended, -2, forced[:, start : start + tiers.STEPS])
        n = min(max(steps - start, 0), part.shape[1])
        taken, logits, state, seen = run(logits, state, part, np.int32(n))
        state = settle(state, methods)
        tokens.append(taken)
        kept.append(seen)
        last = np.asarray(taken)[:, [n - 1]]
        ended = ended | ((last < 0) | np.isin(last, stop) if n else False)
    logits_kept = None if kept[0] is None else jnp.concatenate(kept, axis=1)
    return jnp.concatenate(tokens, axis=1), logits, state, logits_kept


@functools.partial(jax.jit, static_argnames=("program", "keep_logits"), donate_argnames="state")
def _decode(variables, logits, state, forced, steps, limits: Limits, *, program: Program, keep_logits: bool):
    """Runs decode steps until all rows have ended or `steps` are done."""
    batch, n = forced.shape

    def more(carry):
        i, *_, ended = carry
        return (i < steps) & ~jnp.all(ended)

    def step(carry):
        i, logits, state, out, kept, ended = carry
        want = jax.lax.dynamic_index_in_dim(forced, i, axis=1, keepdims=False)
        token = jnp.where(want >= 0, want, sample(logits, limits, jnp.sum(state[0].seen)))
        ended = ended | (want == -2)
        token = jnp.where(ended, -1, token)
        if keep_logits:
            kept = jax.lax.dynamic_update_index_in_dim(kept, logits, i, axis=1)
        out = jax.lax.dynamic_update_index_in_dim(out, token, i, axis=1)
        ended = ended | jnp.isin(token, limits.stop)
        pos = jnp.where(ended, -1, state[0].seen)[:, None]
        new, state = _advance(variables, token[:, None], pos, state, program)
        return i + 1, jnp.where(ended[:, None], logits, new[:, 0]), state, out, kept, ended

    out = jnp.full((batch, n), -1, jnp.int32)
    kept = jnp.zeros((batch, n if keep_logits else 0, logits.shape[-1]), jnp.float32)
    ended = jnp.zeros((batch,), bool)
    carry = (jnp.int32(0), logits, state, out, kept, ended)
    _, logits, state, out, kept, _ = jax.lax.while_loop(more, step, carry)
    return out, logits, state, kept if keep_logits else None
