"""Compiles programs that touch K and V in host memory, by name, for a described TPU: a JSON line each.

Run by unit/test_host_programs.py, since some failures of these compilers end the process.
"""

import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp
from method_cases import codebooks

from experiments import decode_model
from kvjax import decoding, far_tree, reading, states, tiers
from kvjax.methods import layers, per_layer
from kvjax.methods.a2ats import A2ATS
from kvjax.methods.leoam import LeoAM
from kvjax.program import Program
from kvjax.sampling import Sampling
from pallas_kernels import dispatch
from pallas_kernels.host import on_host
from pallas_kernels.topology import Described

BATCH, SLOTS, CHUNK = 1, 8000, 256  # what steps read is little beside it


def programs(at: Described):
    """Yields the programs by name with their arguments' shapes: those of a prompt, of steps, and between."""
    model = decode_model.abstract("tiny", decode_model.config_of("tiny", 2))
    method = A2ATS(topk=8, calibration=codebooks(model), far=64, tier="host", host_block=32, hot=0)
    state = jax.eval_shape(lambda: states.init_state(model, method, BATCH, SLOTS))
    resized = lambda kv: kv.replace(tier=tiers.resize(kv.tier, CHUNK))  # noqa: E731
    wide = jax.eval_shape(lambda state: tuple(map(resized, state)), state)
    one, some, many = (jax.ShapeDtypeStruct((BATCH, n), jnp.int32) for n in (1, tiers.STEPS, CHUNK))
    logits = jax.ShapeDtypeStruct((BATCH, model.config.vocab_size), jnp.float32)
    params, logits, state, wide, one, some, many = at.spread(
        (model.variables, logits, state, wide, one, some, many)
    )
    program = {"program": Program.of(model, method)}
    limits = Sampling().limits()
    yield "chunk of a prompt", reading._read, (params, many, many, wide), program | {"n_queries": 1}
    yield "step", decoding._step, (params, one, one, state), program
    steps = {"limits": limits, "keep_logits": False}
    yield "steps", decoding._decode, (params, logits, state, some, jnp.int32(3)), program | steps
    yield "flush", states._flush, (state[0],), {}
    yield "flush of a chunk", states._flush, (wide[0],), {}


def leoam_programs(at: Described):
    """Yields the programs that need LeoAM, in the same form."""
    model = decode_model.abstract("tiny", decode_model.config_of("tiny", 2))
    slots, steps = (SLOTS,) * model.config.n_kv_heads, {"limits": Sampling().limits(), "keep_logits": False}
    for name, more in (
        ("abstracts", {"tier": "host", "abstracts": "host"}),
        ("a disk", {"disk": "a folder"}),
    ):
        method = LeoAM(64, **more)
        parts = list(zip(per_layer(method, model.config), layers(model.config), strict=True))
        make = functools.partial(init, parts, slots, model.dtype)
        some = jax.ShapeDtypeStruct((BATCH, tiers.STEPS), jnp.int32)
        logits = jax.ShapeDtypeStruct((BATCH, model.config.vocab_size), jnp.float32)
        args = at.spread((model.variables, logits, jax.eval_shape(make), some))
        program = {"program": Program.of(model, method)}
        yield f"steps with {name}", decoding._decode, (*args, jnp.int32(3)), program | steps
        kv = args[2][0]
        if method.abstracts == "host":
            tree, options = kv.aux, {"room": tiers.STEPS, "slots": kv.slots, "shape": method.shape}
            yield f"flush of {name}", far_tree._settled, (tree.far, tree.new, tree.first, kv.fill), options


def init(parts, slots, dtype):
    """The empty state of each layer, without the files that a disk's would have."""
    return tuple(method.init(layer, BATCH, slots, dtype) for method, layer in parts)


def main(device: str, *names: str) -> None:
    at = Described(device)
    with at.compiling():
        for name, run, args, options in itertools.chain(programs(at), leoam_programs(at)):
            if name not in names:
                continue
            with dispatch.watch() as taken:
                lowered = run.lower(*args, **options)
            memory = lowered.compile().memory_analysis()
            far = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args) if on_host(x))
            line = {"name": name, "taken": taken, "far_bytes": far, "temp_bytes": memory.temp_size_in_bytes}
            for kind in ("argument", "output", "alias", "temp"):
                line[f"host_{kind}_bytes"] = getattr(memory, f"host_{kind}_size_in_bytes")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
