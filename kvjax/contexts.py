"""Saves what a model has read, and opens it again without reading it anew.

A context is written beside the old one and takes its place when all of it is on the disk, so a crash leaves
the old one or the new one, see `context_folder`. All arrays of a state are kept as they are, bit by bit,
whatever the method. Layers whose rows lie on the disk already are saved where they lie: what is written of
them is the method's index, and the chunk of each head that is not full yet.
"""

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kvjax import blocks, context_folder, context_layers, disk
from kvjax.cache import KV, Layer
from kvjax.chunk_store import Store
from kvjax.method import CacheMethod
from kvjax.methods import layers, per_layer
from kvjax.model import Model, fingerprint
from kvjax.reading import prefill
from kvjax.states import State

__all__ = ["Context", "close_context", "load_context", "recover_context", "save_context"]


@dataclass(frozen=True, eq=False)
class Context:
    """A state that was opened again.

    Args:
        state: as it was saved.
        tokens: what had been read, [B T] with -1 for padding; None where it was not given.
        repaired: what was damaged, where the tokens were read anew; None where nothing was.
    """

    state: State
    tokens: Int[np.ndarray, "B T"] | None
    repaired: str | None = None


def save_context(
    folder: Path | str,
    model: Model,
    method: CacheMethod,
    state: State,
    tokens: Any = None,
) -> None:
    """Saves a state; one that is in the folder is replaced once this one is whole.

    Args:
        folder: of a method that keeps rows on a disk, its own.
        method: that the state is of.
        tokens: what has been read, [B T], to be kept with it.

    Raises:
        ValueError: for a state that lies on the host or on several devices, or a folder that another process
            writes to.
        OSError: where the disk is too small, which is looked at first, or refuses; the folder is as before.

    Example:
        >>> import kvjax, tempfile
        >>> model, method = kvjax.load("smollm2-135m"), kvjax.METHODS["full"]()
        >>> ids = kvjax.pad([model.tokenizer.encode("The capital of France is")])
        >>> logits, state = kvjax.prefill(model, ids, method, room=2)
        >>> folder = tempfile.mkdtemp()
        >>> kvjax.save_context(folder, model, method, state)
        >>> state = kvjax.load_context(folder, model, method).state
        >>> logits, state = kvjax.decode_step(model, logits.argmax(-1), state, method)
        >>> model.tokenizer.decode(logits.argmax(-1).tolist())
        '.'
    """
    if model.mesh is not None or any(kv.tier is not None and not disk.on_disk(kv) for kv in state):
        raise ValueError(
            'a context lies on one device or a disk, got one spread or on the host: take tier="device"'
        )
    folder, own = Path(folder).resolve(), disk.Disk.of(state)
    if own is not None and own.folder != folder:
        raise ValueError(
            f"rows on a disk stay in their folder, {str(own.folder)!r}, got {str(folder)!r}: save there"
        )
    with contextlib.nullcontext() if own else context_folder.lock(folder):
        saved = [context_layers.parts(kv, own and own.stores.get(i)) for i, kv in enumerate(state)]
        context_folder.check_space(folder, sum(map(context_layers.file_bytes, saved)))
        if own:
            own.sync()
        parts = context_folder.new_generation(folder)
        generation = int(parts.name)
        try:
            about = {
                **_identity(model, method), "generation": generation,
                "layers": [
                    context_layers.write(parts / f"{i:03}.blocks", kv.slots, tree, generation)
                    for i, (kv, tree) in enumerate(zip(state, saved, strict=True))
                ],
                "chunks": own and own.generation,
                "tokens": None if tokens is None else np.asarray(tokens).tolist(),
            }  # fmt: skip
            context_folder.sync(parts)
            context_folder.write_manifest(folder, about)
        except BaseException:
            shutil.rmtree(parts, ignore_errors=True)
            raise
        context_folder.sweep(folder)


def load_context(folder: Path | str, model: Model, method: CacheMethod, *, repair: bool = False) -> Context:
    """Opens a context.

    Rows that lie on the disk stay there, and are checked when a step reads them.

    Args:
        method: the one that it was saved with; budgets, and how it reads ahead, may differ.
        repair: check all of it first; where a block is damaged, read the tokens anew, if they were saved, and
            save what comes of it.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for that of another model, method, format or byte order, a damaged manifest, or a folder
            that another process, or another state of a disk, uses.
        DamagedBlock: for a damaged or missing block, which it names.

    Example:
        >>> import kvjax, tempfile
        >>> model, method = kvjax.load("smollm2-135m"), kvjax.METHODS["full"]()
        >>> ids = kvjax.pad([[5, 6, 7]])
        >>> _, state = kvjax.prefill(model, ids, method, room=2)
        >>> folder = tempfile.mkdtemp()
        >>> kvjax.save_context(folder, model, method, state, tokens=ids)
        >>> kvjax.load_context(folder, model, method).tokens
        array([[5, 6, 7]], dtype=int32)
    """
    folder = Path(folder).resolve()
    about = context_folder.read_manifest(folder)
    context_folder.check_identity(about, _identity(model, method), folder)
    tokens = None if about["tokens"] is None else np.asarray(about["tokens"], np.int32)
    try:
        return Context(_load(folder, about, model, method, whole=repair), tokens)
    except blocks.DamagedBlock as error:
        if not repair or tokens is None or method.evicts:
            raise
        room = max(max(layer["slots"]) for layer in about["layers"]) - tokens.shape[1]
        _, state = prefill(model, tokens, method, room=max(room, 0))
        save_context(folder, model, method, state, tokens)
        return Context(state, tokens, str(error))


def close_context(state: State) -> None:
    """Lets the folder go that a state's rows lie in; the state cannot be used any more.

    `generate` and `stream` do so at their end. Nothing for a state that is not on a disk.

    Raises:
        ValueError: for a state that was closed.

    Example:
        >>> import kvjax, tempfile
        >>> model = kvjax.load("smollm2-135m")
        >>> method = kvjax.METHODS["leoam"](disk=tempfile.mkdtemp())
        >>> _, state = kvjax.prefill(model, kvjax.pad([[5, 6, 7]]), method)
        >>> kvjax.close_context(state)
    """
    if (own := disk.Disk.of(state)) is not None:
        own.close()


def recover_context(folder: Path | str, model: Model, method: CacheMethod) -> Context:
    """Opens what is on the disk of a context whose process ended before it was saved.

    Of every row it has the tokens whose chunks are whole in all layers, see `state[0].seen`: go on with
    `prefill(..., state=state)` from there.

    Args:
        method: the one that it was made with, which keeps the rows of all layers on a disk.

    Raises:
        FileNotFoundError: where nothing is left that was not saved.
        ValueError: as `load_context`; and for a method with layers that are not on the disk.

    Example:
        >>> import kvjax, tempfile
        >>> model = kvjax.load("smollm2-135m")
        >>> method = kvjax.METHODS["leoam"](disk=tempfile.mkdtemp())
        >>> _ = kvjax.prefill(model, kvjax.pad([list(range(200))]), method)
        >>> kvjax.recover_context(method.disk, model, method).state[0].seen.tolist()  # whole chunks of 32
        [192]
    """
    folder = Path(folder).resolve()
    for parts in reversed(context_folder.generations(folder) if folder.is_dir() else []):
        if (parts / "manifest.json").exists():
            about = context_folder.read_manifest(parts)
            context_folder.check_identity(about, _identity(model, method), folder)
            return Context(_recovered(folder, about, model, method), None)
    raise FileNotFoundError(f"a context has chunks on the disk, got none in {str(folder)!r}")


def _recovered(folder: Path, about: Mapping[str, Any], model: Model, method: CacheMethod) -> State:
    """Makes a state of whole chunks."""
    own, state, kinds = disk.opened(folder), [], zip(*_kinds(model, method), strict=True)
    try:
        own.generation = about["chunks"]
        for i, (m, layer) in enumerate(kinds):
            kv = m.init(layer, about["batch"], about["slots"][i], model.dtype)
            if not disk.on_disk(kv):
                raise ValueError(
                    f"what is recovered lies on the disk in all layers, got layer {i} elsewhere: read the "
                    "tokens anew"
                )
            kv = disk.reopened(own, i, kv)
            own.stores[i].find()
            state.append(kv)
        end = np.min([store.end.min(1) for store in own.stores.values()], axis=0)
        for store in own.stores.values():
            store.end[:] = end[:, None]
            store.forget()
        return tuple(
            _rebuilt(m, kv, store)
            for m, kv, store in zip(_kinds(model, method)[0], state, own.stores.values(), strict=True)
        )
    except BaseException:
        own.close()
        raise


def _rebuilt(method: CacheMethod, kv: KV, store: Store) -> KV:
    """Returns the state of a layer whose rows are in its store: slots are in order, so the rest follows."""
    end, size = jnp.asarray(store.end, jnp.int32), max(kv.slots)
    inside = (jnp.arange(size) < end[..., None]).reshape(len(end), -1)
    pos = jnp.where(inside, jnp.tile(jnp.arange(size), end.shape[1]), 0).astype(kv.pos.dtype)
    kv = kv.replace(pos=pos, mass=inside.astype(kv.mass.dtype), fill=end, seen=end[:, 0])
    rows = jnp.asarray(store.everything())
    store.check()
    k, v = (rows[..., i, :].reshape(*pos.shape, -1) for i in range(2))
    aux = method.moved(kv.replace(k=k, v=v, tier=None), None).aux
    return kv.replace(aux=aux, tier=kv.tier.replace(first=jnp.array(end)))


def _load(folder: Path, about: Mapping[str, Any], model: Model, method: CacheMethod, *, whole: bool) -> State:
    """Opens every layer; whole: checks the rows on the disk as well."""
    parts, state = folder / f"{about['generation']:08}", []
    own = None if about["chunks"] is None else disk.opened(folder)
    try:
        if own:
            own.generation = about["chunks"]
        for i, (saved, m, layer) in enumerate(zip(about["layers"], *_kinds(model, method), strict=True)):
            made = context_layers.shapes(m, layer, saved, model.dtype)
            kv, *rest = context_layers.read(parts / f"{i:03}.blocks", saved, about["generation"], made)
            if rest:
                kv = _with_rows(own, i, kv, rest, m.init(layer, len(kv.seen), kv.slots, model.dtype))
                if whole:
                    own.stores[i].verify()
                    own.stores[i].check()
            state.append(kv)
        return tuple(state)
    except BaseException:
        if own:
            own.close()
        raise


def _with_rows(own: disk.Disk, index: int, kv: KV, rest: Sequence, empty: KV) -> KV:
    """Returns a layer's state with its rows, which lie on the disk."""
    aux = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), kv.aux, empty.aux)
    kv = kv.replace(aux=aux, tier=empty.tier.replace(first=jnp.array(kv.fill)))
    kv = disk.reopened(own, index, kv)
    store = own.stores[index]
    store.end[:], store.tail[:] = (np.asarray(x) for x in rest)
    store.forget()
    return kv


def _identity(model: Model, method: CacheMethod) -> dict[str, Any]:
    return context_folder.identity(fingerprint(model), repr(method))


def _kinds(model: Model, method: CacheMethod) -> tuple[Sequence[CacheMethod], Sequence[Layer]]:
    return per_layer(method, model.config), layers(model.config)
