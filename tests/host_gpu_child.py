"""Compiles programs with K and V, and abstracts, on the host for an H100, and prints what XLA makes of them.

Run by unit/test_host_programs.py, since some failures of this compiler end the process.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from method_cases import codebooks

from experiments import decode_model
from kvjax import decoding, far_tree, reading, states, tiers
from kvjax.methods.a2ats import A2ATS
from kvjax.methods.leoam import LeoAM
from kvjax.program import Program
from kvjax.sampling import Sampling
from pallas_kernels import dispatch
from pallas_kernels.topology import Described

BATCH, SLOTS, CHUNK, LAYERS = 2, 2048, 512, 6


def programs(host_bits):
    """The programs, traced with small arrays in the host memory of this machine."""
    model = decode_model.random("tiny", decode_model.config_of("tiny", LAYERS), 0)
    method = A2ATS(60, codebooks(model), far=64, tier="host", host_bits=host_bits)
    program = Program.of(model, method)
    state = states.init_state(model, method, BATCH, SLOTS)
    wide = states.settle(state, program.methods, CHUNK)
    limits, logits = Sampling().limits(), jnp.zeros((BATCH, model.config.vocab_size))
    forced, ids = np.full((BATCH, tiers.STEPS), -1, np.int32), np.zeros((BATCH, CHUNK), np.int32)
    steps = np.int32(tiers.STEPS)
    options = {"program": program, "keep_logits": False}
    return {
        "flush": lambda: states._flush.trace(state[0]),
        "decode": lambda: decoding._decode.trace(
            model.variables, logits, state, forced, steps, limits, **options
        ),
        "read": lambda: reading._read.trace(model.variables, ids, ids, wide, program=program, n_queries=1),
    }


def abstracts():
    """The programs that touch abstracts on the host."""
    model = decode_model.random("tiny", decode_model.config_of("tiny", LAYERS), 0)
    method = LeoAM(64, tier="host", abstracts="host")
    program = Program.of(model, method)
    state = states.init_state(model, method, BATCH, SLOTS)
    limits, logits = Sampling().limits(), jnp.zeros((BATCH, model.config.vocab_size))
    forced, steps = np.full((BATCH, tiers.STEPS), -1, np.int32), np.int32(tiers.STEPS)
    kv, shape = state[0], program.methods[0].shape
    return {
        "decode with abstracts": lambda: decoding._decode.trace(
            model.variables, logits, state, forced, steps, limits, program=program, keep_logits=False
        ),
        "flush of abstracts": lambda: far_tree._settled.trace(
            kv.aux.far, kv.aux.new, kv.aux.first, kv.fill, room=tiers.STEPS, slots=kv.slots, shape=shape
        ),
    }


def main() -> None:
    cudnn.check_cudnn_version = lambda: 91200  # described devices have no cuDNN to ask; XLA needs none
    at = Described("h100")
    for bits in (None, 8):
        for name, trace in (programs(bits) | ({} if bits else abstracts())).items():
            with at.compiling(), dispatch.watch() as taken:
                compiled = at.compile(trace())
            memory = compiled.get_compiled_memory_stats()
            sizes = {key: getattr(memory, key) for key in dir(memory) if key.endswith("in_bytes")}
            (module,) = compiled.hlo_modules()
            copies = sum("copy-start" in line and "S(5)" in line for line in module.to_string().splitlines())
            print(
                json.dumps({"name": name, "bits": bits, "taken": taken, "host_copies": copies} | sizes),
                flush=True,
            )


if __name__ == "__main__":
    jax.devices()
    main()
