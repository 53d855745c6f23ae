"""Compiles the whole decode step for eight described TPU chips and prints what the compiler says of it.

usage: python decode_child.py '{"device": "v5e", "shape": "tiny", "n_layers": null, "cases": [[1, 256]]}'

A JSON line a case. `experiments.decode` runs it: libtpu reads its settings from the environment,
and some of its failures end the process.
"""

import dataclasses
import json
import math
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import decode_model
from kvjax import decoding, sharding, states
from kvjax.methods.full import Full
from kvjax.program import Program
from pallas_kernels import dispatch
from pallas_kernels.topology import Described

__all__ = ["collectives", "compiled_step", "copies", "main"]

_COLLECTIVE = re.compile(
    r" = (.+?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)
_COPY = re.compile(r" = \(?[a-z]+\d*\[([\d,]*)\](\S*) .*?(?:copy|copy-start|transpose|convert)\(")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_VMEM = "S(1)"  # in a layout: the array is not in HBM, but was brought next to the cores to be read


def main(request: str) -> None:
    """Compiles every case of a request."""
    asked = json.loads(request)
    config = decode_model.config_of(asked["shape"], asked["n_layers"])
    for batch, slots in asked["cases"]:
        try:
            found = compiled_step(Described(asked["device"], eight=True), config, batch, slots)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found = {"fits": False, "error": str(error)[:500]}
        print(json.dumps({"batch": batch, "slots": slots} | found), flush=True)


def compiled_step(at: Described, config: Any, batch: int, slots: int) -> dict:
    """Compiles one step with the full cache, spread over the KV heads; all bytes are of one device."""
    mesh, model = at.mesh(), decode_model.abstract("shapes", config)
    program = dataclasses.replace(Program.of(model, Full()), mesh=mesh)
    state = jax.eval_shape(lambda: states.init_state(model, Full(), batch, slots))
    state = _placed(state, sharding.of_state(state, mesh))
    params = _placed(model.params, sharding.of_parameters(model.params, mesh))
    ids = _on_all(jax.ShapeDtypeStruct((batch, 1), jnp.int32), mesh)
    start = time.perf_counter()
    with at.compiling(), dispatch.watch() as taken:
        step = decoding._step.lower({"params": params}, ids, ids, state, program=program).compile()
    compile_s, memory, text = time.perf_counter() - start, step.memory_analysis(), step.as_text()
    found = {
        f"{name}_bytes": getattr(memory, f"{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp")
    }
    return found | {
        "peak_bytes": memory.peak_memory_in_bytes,
        "state_bytes": _own_bytes(state),
        "params_bytes": _own_bytes(params),
        "collectives": collectives(text),
        "cache_copies": copies(text, (batch, slots * config.n_kv_heads // mesh.size, config.head_dim)),
        "impl": taken,
        "fits": True,
        "compile_s": compile_s,
        "libtpu": _version("libtpu"),
    }


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Returns per kind of collective how many a program has, and the bytes of the largest.

    Example:
        >>> collectives("%x.1 = bf16[8,4096]{1,0} all-reduce(%y), channel_id=1")
        {'all-reduce': {'count': 1, 'largest_bytes': 65536}}
    """
    found: dict[str, dict[str, int]] = {}
    for kind, name in _COLLECTIVE.findall(text):
        one = found.setdefault(name, {"count": 0, "largest_bytes": 0})
        one["count"] += 1
        one["largest_bytes"] = max(one["largest_bytes"], *(_array_bytes(*a) for a in _ARRAY.findall(kind)))
    return found


def copies(text: str, shape: tuple[int, ...]) -> int:
    """Returns how many times a program copies or converts an array of this shape within HBM.

    Example:
        >>> copies("%c = f32[2,8,4]{2,1,0} convert(%k)", (2, 8, 4))
        1
    """
    wanted = ",".join(map(str, shape))
    return sum(dims == wanted and _VMEM not in layout for dims, layout in _COPY.findall(text))


def _array_bytes(kind: str, dims: str) -> int:
    """Returns the bytes of an array by its type and dimensions, as HLO writes them."""
    bits = int((re.search(r"\d+", kind) or ["8"])[0])
    return math.prod(map(int, filter(None, dims.split(",")))) * bits // 8


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _on_all(x: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return _placed(x, NamedSharding(mesh, PartitionSpec()))


def _own_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds."""
    sizes = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * size for shape, size in sizes)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    main(sys.argv[1])
