"""Reads prompts, padded on the left so that all rows end together, in chunks."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kvjax import tiers
from kvjax.cache import KV
from kvjax.method import CacheMethod
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.program import Program, compressed
from kvjax.states import State, check_room, each_layer, init_state, settle, widen

__all__ = ["pad", "prefill", "prompt_logits", "read"]


def pad(prompts: Sequence[Sequence[int]], multiple: int = 1) -> Int[np.ndarray, "B T"]:
    """Stacks prompts of different lengths, padded with -1 on the left to a multiple of tokens.

    Example:
        >>> pad([[5, 6, 7], [8]])
        array([[ 5,  6,  7],
               [-1, -1,  8]], dtype=int32)
    """
    length = -(-max(map(len, prompts)) // multiple) * multiple
    ids = np.full((len(prompts), length), -1, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    return ids


def prefill(
    model: Model,
    ids: Int[np.ndarray, "B T"],
    method: CacheMethod = Full(),  # noqa: B008  frozen
    *,
    room: int = 0,
    chunk: int = 512,
    compress: str = "end",
    state: State | None = None,
) -> tuple[Float[Array, "B V"], State]:
    """Reads prompts and compresses them.

    Args:
        ids: prompts padded with -1 on the left, see `pad`.
        room: tokens that will follow the prompt.
        chunk: tokens read at once, 2 or more: with one, some methods choose what they read, as in a step.
        compress: "end" compresses when the prompt has been read (the paper of every method here),
            "chunk" after each chunk, so that memory follows the budget and not the prompt.
        state: a state to go on from, made by an earlier call with the same method.

    Returns: logits after the last token, and the state.

    Raises:
        ValueError: for ids outside the vocabulary, an empty batch, prompts that leave no `room` in
            the context or in the given state, a chunk below 2, or another value of `compress`.

    Example:
        >>> import kvjax
        >>> model = kvjax.load("smollm2-135m")
        >>> ids = kvjax.pad([model.tokenizer.encode("The capital of France is")])
        >>> logits, state = kvjax.prefill(model, ids, room=2)
        >>> model.tokenizer.decode(logits.argmax(-1).tolist())
        ' Paris'
        >>> len(state), state[0].k.shape  # layers, [B R D]
        (30, (1, 54, 64))
    """
    ids = _check(model, ids)
    _check_parts(chunk, compress)
    program = Program.of(model, method)
    methods = program.methods
    n_queries = max(m.n_queries for m in methods)
    longest, context = int((ids >= 0).sum(1).max()), model.config.context_length
    _check_fits(context, 0 if state is None else int(np.max(state[0].seen)), longest, room)
    chunk = _chunk_size(ids.shape[1], max(chunk, n_queries))
    ids = pad([row[row >= 0].tolist() for row in ids], chunk)
    if state is None:
        total = min(ids.shape[1] + room, context)
        state = init_state(model, method, len(ids), total, ids.shape[1] if compress == "end" else 0)
    else:
        check_room(state, methods, longest + room)
        state = widen(state, model, method, ids.shape[1]) if compress == "end" else state
    pos = _positions(ids, state)
    state = settle(state, methods, chunk)
    for start in range(0, ids.shape[1], chunk):
        part, last = slice(start, start + chunk), start + chunk == ids.shape[1]
        if compress == "chunk":
            state = widen(state, model, method, chunk)
        logits, state, queries = _read(
            model.variables, ids[:, part], pos[:, part], state, program=program, n_queries=n_queries
        )
        state = settle(state, methods, tiers.STEPS if last else chunk)
        if compress == "chunk" or last:
            state = _compress_all(state, queries, jnp.asarray(pos[:, part][:, -n_queries:]), program)
    return logits[:, 0], state


def _check_parts(chunk: int, compress: str) -> None:
    if compress not in ("end", "chunk"):
        raise ValueError(f'compress is "end" or "chunk", got {compress=}')
    if chunk < 2:
        raise ValueError(f"a prompt is read 2 or more tokens at once, got {chunk=}")


def _check_fits(context: int, seen: int, longest: int, room: int) -> None:
    """Raises where a prompt, after what was seen, and the room after it are longer than the context."""
    if room < 0 or seen + longest + room > context:
        raise ValueError(
            f"a prompt and what follows it fit the context of {context} tokens, got {longest} and {room=}"
            + (f" after {seen}" if seen else "")
        )


def _positions(ids: np.ndarray, state: State) -> np.ndarray:
    """Returns the positions of a prompt's tokens after those of the state, -1 for padding."""
    seen = np.asarray(state[0].seen)[:, None]
    return np.where(ids >= 0, np.cumsum(ids >= 0, axis=1) - 1 + seen, -1).astype(np.int32)


def read(
    model: Model, ids: Int[np.ndarray, "B T"], method: CacheMethod, state: State
) -> tuple[Float[Array, "B T V"], State]:
    """Appends tokens without compression and returns the logits after each. The given state is consumed.

    Raises:
        ValueError: as `prefill`; -1 is not allowed here.
    """
    ids = _check(model, ids)
    if (ids < 0).any():
        raise ValueError("logits take rows of one length, got padding: call once per length")
    pos = np.asarray(state[0].seen)[:, None] + np.arange(ids.shape[1], dtype=np.int32)
    program = Program.of(model, method)
    check_room(state, program.methods, ids.shape[1])
    state = settle(state, program.methods, ids.shape[1])
    logits, state, _ = _read(model.variables, ids, pos, state, program=program, last_only=False)
    return logits, settle(state, program.methods)


def _chunk_size(length: int, chunk: int) -> int:
    """Returns how many tokens of a prompt are read at once: a power of two where the prompt is short."""
    return min(chunk, max(16, 1 << (length - 1).bit_length()))


@functools.partial(jax.jit, static_argnames=("program", "n_queries", "last_only"), donate_argnames="state")
def _read(variables, ids, pos, state, *, program: Program, n_queries: int = 0, last_only: bool = True):
    """Runs one chunk of a prompt; also returns each layer's newest n_queries queries."""
    logits, state, records = program.run(variables, ids, pos, state, last_only=last_only)
    return logits, state, tuple(r.q[:, max(r.q.shape[1] - n_queries, 0) :] for r in records)


def _compress_all(state: State, queries: Sequence, pos: Array, program: Program) -> State:
    """Compresses every layer."""
    m, mesh = program.methods, program.mesh
    return each_layer(state, lambda i, kv: _compress(kv, queries[i], pos, method=m[i], mesh=mesh))


@functools.partial(jax.jit, static_argnames=("method", "mesh"))
def _compress(kv: KV, q: Array, pos: Array, *, method: CacheMethod, mesh: Mesh | None) -> KV:
    """Compresses one layer; equal layers share one program."""
    return compressed(kv, q, pos, method, mesh)


def prompt_logits(model: Model, ids: Int[np.ndarray, "B T"]) -> Float[Array, "B T V"]:
    """Returns the logits after every token, with the full cache.

    Raises:
        ValueError: as `prefill`; -1 is not allowed here, since rows have one length.
    """
    ids = _check(model, ids)
    state = init_state(model, Full(), len(ids), ids.shape[1], ids.shape[1])
    return read(model, ids, Full(), state)[0]


def _check(model: Model, ids: Any) -> Int[np.ndarray, "B T"]:
    """Returns ids as int32, or raises where they cannot be run."""
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.size == 0:
        raise ValueError(f"prompts are a batch [B T] of at least one token, got shape {ids.shape}")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"token ids are integers, got {ids.dtype=}")
    vocab = model.config.vocab_size
    if ids.min() < -1 or ids.max() >= vocab:
        raise ValueError(
            f"token ids are in [0, {vocab}), -1 for padding, got {int(ids.min())}..{int(ids.max())}"
        )
    return ids.astype(np.int32)
