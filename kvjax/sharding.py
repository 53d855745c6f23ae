"""Spreads a model and its KV state over devices: tensor parallel, by KV heads, on a mesh of one axis.

XLA partitions the matrix products by itself, from the specs of the parameters. It cannot partition
a kernel, so what touches the state of a layer, from writing to compressing, runs in `over_heads`:
each device has a KV head's part of everything and never sees another's. For that the heads of a
layer must be alike, and a method must not compare them.

Rule for states, which aux obeys too: arrays with more than one axis hold heads along axis 1, one
head's part after the other's; arrays of one axis are the same for all heads.

Source: Megatron-LM (arXiv 1909.08053), section 3: q, k, v, gate and up are split by columns, o and
down by rows, so that a layer has two all-reduces.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kvjax import storage
from kvjax.cache import KV
from kvjax.method import CacheMethod
from kvjax.model import Model

__all__ = ["check", "make_mesh", "of_parameters", "of_state", "over_heads", "shard"]

_AXES = {  # which axis of a parameter is split; the others are whole on every device
    "embedding": 0,
    "head/kernel": 1,
    **{f"{name}/kernel": 1 for name in ("q", "k", "v", "gate", "up")},
    **{f"{name}/bias": 0 for name in ("q", "k", "v")},
    "o/kernel": 0,
    "down/kernel": 0,
}


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of one axis over the devices, by default over all."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("x",))


def shard(model: Model, mesh: Mesh) -> Model:
    """Returns the model spread over a mesh: `prefill`, `decode` and `generate` then run on all of it.

    Raises:
        ValueError: for a mesh of several axes, or one that does not divide the KV heads.

    Example:
        >>> import kvjax
        >>> model = shard(kvjax.load("smollm2-135m"), make_mesh())
        >>> kvjax.generate(model, "The capital of France is", max_new_tokens=2)[0].text
        ' Paris.'
    """
    if len(mesh.axis_names) != 1:
        raise ValueError(f"a mesh has one axis, got {mesh.axis_names}: make it by make_mesh")
    if model.config.n_kv_heads % mesh.size:
        raise ValueError(
            f"devices have equally many KV heads, got n_kv_heads={model.config.n_kv_heads} for "
            f"{mesh.size} devices: take a number of devices that divides it"
        )
    params = jax.device_put(model.params, of_parameters(model.params, mesh))
    return dataclasses.replace(model, params=params, mesh=mesh)


def of_parameters(params: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every parameter; what the mesh does not divide is whole everywhere."""

    def one(path: tuple, x: Any) -> NamedSharding:
        names = [key.key for key in path]
        axis = _AXES.get("/".join(names[-2:]), _AXES.get(names[-1]))
        if axis is None or x.shape[axis] % mesh.size:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*(None,) * axis, *mesh.axis_names))

    return jax.tree_util.tree_map_with_path(one, params)


def of_state(state: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every array of a KV state."""
    by_head, whole = (NamedSharding(mesh, spec) for spec in (P(None, *mesh.axis_names), P()))
    return jax.tree.map(lambda x: by_head if x.ndim > 1 else whole, state)


def check(mesh: Mesh | None, method: CacheMethod, slots: Sequence[int]) -> None:
    """Raises ValueError where a layer's heads cannot lie on different devices."""
    if mesh is None or mesh.size == 1:
        return
    if method.tier != "device":
        raise ValueError(f'several devices keep K and V themselves, got {method.tier=}: take tier="device"')
    method.for_heads(len(slots) // mesh.size)
    if len(set(slots)) != 1:
        raise ValueError(
            f"heads of a layer have equal slots on several devices, got {tuple(slots)}: "
            f"give one budget per layer, or use one device"
        )
    if method.couples_heads:
        raise ValueError(
            f"a method ranks each KV head by itself on several devices, got {method}, which ranks the "
            f"heads of a layer together: choose another, or use one device"
        )


def over_heads(
    mesh: Mesh | None, step: Callable[..., tuple[KV, Any]], method: CacheMethod, kv: KV, *tokens: jax.Array
) -> tuple[KV, Any]:
    """Runs step(method, kv, *tokens) -> (kv, out), on every device for its own heads.

    Args:
        mesh: None runs it as it is.
        tokens: arrays [B T] are given whole, others [B T K ...] are split, as the output is.

    Raises:
        ValueError: where the heads of the layer cannot lie on different devices.
    """
    if mesh is None:
        return step(method, kv, *tokens)
    check(mesh, method, kv.slots)
    (axis,), n_kv_heads = mesh.axis_names, kv.layer.n_kv_heads // mesh.size
    own = method.for_heads(n_kv_heads)
    by_head, by_token = P(None, axis), P(None, None, axis)

    def run(kv: KV, seen: jax.Array, *tokens: jax.Array) -> tuple:
        before = jax.lax.axis_index(axis) * n_kv_heads
        kv = _heads(kv.replace(seen=seen), n_kv_heads, before)
        kv, out = step(own, kv, *tokens)
        kv = _heads(kv, n_kv_heads * mesh.size, -before)
        return kv.replace(seen=None), kv.seen, out

    kv, seen, out = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(by_head, P(), *(by_token if x.ndim > 2 else P() for x in tokens)),
        out_specs=(by_head, P(), by_token),
        check_vma=False,  # kernels do not say what varies over devices
    )(kv.replace(seen=None), kv.seen, *tokens)
    return kv.replace(seen=seen), out


def _heads(kv: KV, n: int, before: Any) -> KV:
    """Describes a state as one of n heads, of which the first lies `before` heads after the old first."""
    size = kv.slots[0]
    slots = (size,) * n
    k, v = (storage.renumber(store, before * size, slots) for store in (kv.k, kv.v))
    return kv.replace(k=k, v=v, slots=slots, layer=dataclasses.replace(kv.layer, n_kv_heads=n))
