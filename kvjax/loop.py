"""Reads prompts and takes decode steps: the only loop over tokens.

Prompts are padded on the left, so that all rows end together, and read in chunks; decoding runs
many steps in one compiled program whose state is donated and updated in place.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kvjax import cache, disk, sharding, tiers
from kvjax.cache import KV
from kvjax.method import CacheMethod
from kvjax.methods import per_layer
from kvjax.methods.full import Full
from kvjax.model import Model
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder
from kvjax.sampling import Limits, Sampling, sample
from kvjax.shapes import Ids
from kvjax.states import State, check_room, each_layer, init_state, settle, widen

__all__ = [
    "Program",
    "chunk_size",
    "decode",
    "decode_step",
    "pad",
    "prefill",
    "prompt_logits",
    "read",
]


@dataclass(frozen=True)
class Program:
    """What a compiled program depends on beside shapes; equal ones compile once."""

    config: ModelConfig
    dtype: Any
    methods: tuple[CacheMethod, ...]  # one per layer
    mesh: Mesh | None = None  # devices that share the KV heads

    @classmethod
    def of(cls, model: Model, method: CacheMethod) -> "Program":
        """Returns the program of a model with a method."""
        return cls(model.config, model.dtype, per_layer(method, model.config), model.mesh)

    def run(self, variables: Any, *args: Any, **options: Any) -> tuple:
        """Applies the decoder to the variables of a model."""
        return Decoder(self.config, self.dtype, self.mesh).apply(variables, *args, self.methods, **options)


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
        chunk: tokens read at once.
        compress: "end" compresses when the prompt has been read (the paper of every method here),
            "chunk" after each chunk, so that memory follows the budget and not the prompt.
        state: a state to go on from, made by an earlier call with the same method.

    Returns: logits after the last token, and the state.

    Raises:
        ValueError: for ids outside the vocabulary, an empty batch, prompts that leave no `room` in
            the context or in the given state, or another value of `compress`.

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
    if compress not in ("end", "chunk"):
        raise ValueError(f'compress is "end" or "chunk", got {compress=}')
    program = Program.of(model, method)
    methods = program.methods
    n_queries = max(m.n_queries for m in methods)
    longest, context = int((ids >= 0).sum(1).max()), model.config.context_length
    _check_fits(context, 0 if state is None else int(np.max(state[0].seen)), longest, room)
    chunk = chunk_size(ids.shape[1], max(chunk, n_queries))
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
    state = settle(state, program.methods, ids.shape[1])
    logits, state, _ = _read(model.variables, ids, pos, state, program=program, last_only=False)
    return logits, settle(state, program.methods)


def chunk_size(length: int, chunk: int) -> int:
    """Returns how many tokens of a prompt are read at once: a power of two where the prompt is short."""
    return min(chunk, max(16, 1 << (length - 1).bit_length()))


@functools.partial(jax.jit, static_argnames=("program", "n_queries", "last_only"), donate_argnames="state")
def _read(variables, ids, pos, state, *, program: Program, n_queries: int = 0, last_only: bool = True):
    """Runs one chunk of a prompt; also returns each layer's newest n_queries queries."""
    logits, state, records = program.run(variables, ids, pos, state, last_only=last_only)
    return logits, state, tuple(r.q[:, r.q.shape[1] - n_queries :] for r in records)


def _compress_all(state: State, queries: Sequence, pos: Array, program: Program) -> State:
    """Compresses every layer."""
    m, mesh = program.methods, program.mesh
    return each_layer(state, lambda i, kv: _compress(kv, queries[i], pos, method=m[i], mesh=mesh))


@functools.partial(jax.jit, static_argnames=("method", "mesh"))
def _compress(kv: KV, q: Array, pos: Array, *, method: CacheMethod, mesh: Mesh | None) -> KV:
    """Compresses one layer; equal layers share one program."""
    return _compressed(kv, q, pos, method, mesh)


def _compressed(kv: KV, q: Array, pos: Array, method: CacheMethod, mesh: Mesh | None) -> KV:
    def step(method: CacheMethod, kv: KV, q: Array, pos: Array) -> tuple[KV, None]:
        return method.compress(kv, q, pos), None

    return sharding.over_heads(mesh, step, method, kv, q, pos)[0]


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def _step(variables, ids, pos, state, *, program: Program):
    """Runs one decode step."""
    logits, state = _advance(variables, ids, pos, state, program)
    return logits[:, 0], state


def _advance(variables: Any, ids: Array, pos: Array, state: State, program: Program) -> tuple[Array, State]:
    """Takes a decode step. Methods that have work seldom compress after it, all layers together."""
    logits, state, records = program.run(variables, ids, pos, state, compress=True)
    due = [m.due(kv) for m, kv in zip(program.methods, state, strict=True)]
    if all(d is None for d in due):
        return logits, state

    def compress(state: State) -> State:
        """Compresses layer by layer: each in a loop of its own, so that one at a time exists twice."""
        new = []
        for kv, record, method, flag in zip(state, records, program.methods, due, strict=True):
            change = functools.partial(_compressed, q=record.q, pos=pos, method=method, mesh=program.mesh)
            new.append(kv if flag is None else cache.when(flag, change, kv))
        return tuple(new)

    flag = functools.reduce(jnp.logical_or, (d for d in due if d is not None))
    return logits, cache.when(flag, compress, state)


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


def decode_step(
    model: Model,
    ids: Ids,
    state: State,
    method: CacheMethod = Full(),  # noqa: B008
) -> tuple[Float[Array, "B V"], State]:
    """Appends one token per row and returns the logits of the next. The given state is consumed.

    A row with id -1 is left as it is.

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
    ids = jnp.asarray(ids)[:, None]
    pos = jnp.where(ids >= 0, state[0].seen[:, None], -1)
    program = Program.of(model, method)
    logits, state = _step(model.variables, ids, pos, state, program=program)
    return logits, settle(state, program.methods)


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

    Example:
        >>> import kvjax
        >>> model, method = kvjax.load("smollm2-135m"), kvjax.METHODS["full"]()
        >>> ids = kvjax.pad([model.tokenizer.encode("The capital of France is")])
        >>> logits, state = kvjax.prefill(model, ids, method, room=2)
        >>> tokens, logits, state, _ = kvjax.decode(model, logits, state, method, forced=np.full((1, 2), -1))
        >>> model.tokenizer.decode(tokens[0].tolist())
        ' Paris.'
    """
    steps = forced.shape[1] if steps is None else steps
    program = Program.of(model, method)
    options = {"program": program, "keep_logits": keep_logits}
    run = functools.partial(_decode, model.variables, limits=sampling.limits(), **options)
    forced = np.asarray(forced, np.int32)
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
        token = jnp.where(want >= 0, want, sample(logits, limits, jnp.max(state[0].seen)))
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
