"""Compiles ops for one described device and prints a JSON line per case. Run by test_compile.py."""

import json
import sys
import time

import jax

from pallas_kernels.registry import ops
from pallas_kernels.topology import Described

HOST = "pinned_host"


def case(op, spec, at: Described) -> dict:
    """Compiles one case and returns what the compiler says of it."""
    kernel = op.has_kernel(spec, at.platform)
    arrays = at.spread(jax.eval_shape(spec.arrays, jax.random.key(0)))
    start = time.perf_counter()
    with at.compiling():
        run = jax.jit(
            lambda arrays: op.call(**arrays, **spec.options(), impl=at.platform if kernel else None)
        )
        text = (lowered := run.lower(arrays)).as_text()
        memory = lowered.compile().memory_analysis()
    if kernel and "tpu_custom_call" not in text and "triton" not in text:
        raise RuntimeError("the program holds no kernel")
    far = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays) if x.sharding.memory_kind == HOST)
    if memory.host_argument_size_in_bytes != far:
        raise RuntimeError(f"{far} bytes lie in host memory, got {memory.host_argument_size_in_bytes}")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "temp_bytes": memory.temp_size_in_bytes, "host_bytes": far}


def main(device: str, use: str = "", step: str = "1") -> None:
    """Compiles every case of every op, or of those that are for one use; of these every `step`-th."""
    at = Described(device)
    for name, op in ops().items():
        specs = [s for s in op.specs if at.platform in s.platforms and (not use or use in s.uses)]
        for spec in specs[:: int(step)]:
            line = {"op": name, "spec": spec.name}
            try:
                line |= case(op, spec, at)
            except NotImplementedError as why:
                line["refused"] = str(why)
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
