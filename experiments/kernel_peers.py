"""What each kernel is timed against, on inputs of the peer's own layout made from the same sizes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.op import Op, Spec

__all__ = ["PEERS", "Peer"]


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another way to the same result. prepare: turns an input set into the peer's, before the clock runs."""

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[dict[str, Any]], Any] = lambda arrays: arrays


def _decode(op: Op, spec: Spec) -> Sequence[Peer]:
    """cuDNN and JAX's own op take K and V as [B S K D]; ragged heads and codes are compared with our own."""
    n_heads, size = len(spec.slots), sum(spec.slots) // len(spec.slots)
    if len(set(spec.slots)) > 1:
        return [_itself(op, dataclasses.replace(spec, slots=(size,) * n_heads), "uniform heads")]
    if spec.bits < 16:
        return [_itself(op, dataclasses.replace(spec, bits=16), spec.dtype)]

    def turned(arrays: dict[str, Any]) -> dict[str, Any]:
        rows = (arrays[x].reshape(spec.batch, n_heads, size, spec.head_dim) for x in ("k", "v"))
        k, v = (jnp.swapaxes(x, 1, 2).copy() for x in rows)
        return {"q": arrays["q"].reshape(spec.batch, -1, spec.head_dim), "k": k, "v": v}

    def cudnn(x: dict[str, Any]) -> jax.Array:
        return jax.nn.dot_product_attention(x["q"][:, None], x["k"], x["v"], implementation="cudnn")

    peers = [Peer("cudnn", cudnn, turned)]
    if size % 16 == 0:  # splits of JAX's op, which are all alike
        own = backend.jax_decode_attention()
        peers.append(Peer("jax_op", lambda x: own(**x), turned))
    return peers


def _itself(op: Op, spec: Spec, name: str) -> Peer:
    """Our own kernel on another case."""
    make = jax.jit(spec.arrays)
    return Peer(name, lambda x: op.call(**x, **spec.options()), lambda arrays: make(jax.random.key(1)))


def _exact_scores(op: Op, spec: Spec) -> Sequence[Peer]:
    """q·K over keys of the type of q."""
    shape = (spec.batch, spec.heads, spec.slots, spec.head_dim)

    def prepare(arrays: dict[str, Any]) -> dict[str, Any]:
        return {"q": arrays["q"], "k": jax.random.normal(jax.random.key(2), shape, arrays["q"].dtype)}

    def run(x: dict[str, Any]) -> jax.Array:
        return jnp.einsum("bkgd,bksd->bkgs", x["q"], x["k"], preferred_element_type=jnp.float32)

    return [Peer("exact", run, prepare)]


def _topk(op: Op, spec: Spec) -> Sequence[Peer]:
    return [Peer("lax.top_k", lambda x: jax.lax.top_k(x["scores"], spec.k))]


def _dense(op: Op, spec: Spec) -> Sequence[Peer]:
    """The product with all rows, by XLA; no int8 peer."""
    if spec.quantized:
        return ()

    def run(x: dict[str, Any]) -> jax.Array:
        if "gate" in x:
            return x["gate"] * jnp.einsum("bm,fm->bf", x["x"], x["w_t"])
        return x["x"] @ x["w"]

    return [Peer("dense", run)]


PEERS: Mapping[str, Callable[[Op, Spec], Sequence[Peer]]] = {
    "decode_attention": _decode,
    "select_topk": _topk,
    "spvmm": _dense,
    "vmmsp": _dense,
    "vq_scores": _exact_scores,
}
