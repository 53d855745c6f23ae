"""Compiles a prompt's attention for a described device and prints what was taken, a JSON line a case.

Run by unit/test_prefill_attention.py, since some failures of these compilers end the process.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from experiments import decode_model
from kvjax import reading, states
from kvjax.cache import Layer
from kvjax.methods.full import Full
from kvjax.models.config import RopeConfig
from kvjax.prefill_attention import attend_prompt
from kvjax.program import Program
from pallas_kernels import dispatch
from pallas_kernels.topology import Described

CASES = {  # B T K G D S and what differs from bfloat16 without a soft cap
    "long": ((1, 512, 8, 4, 128, 8192), {}),
    "odd sizes": ((2, 16, 3, 3, 64, 100), {}),
    "large heads": ((1, 64, 1, 4, 256, 1000), {}),
    "soft cap": ((1, 64, 2, 2, 64, 256), {"softcap": 30.0}),
    "float32": ((1, 64, 2, 2, 64, 256), {"dtype": jnp.float32}),
}


def shapes(batch, length, n_heads, group, size, n_slots, dtype) -> tuple:
    s = jax.ShapeDtypeStruct
    slots = (batch, n_heads, n_slots)
    rows = s((*slots, size), dtype)
    q, pos = s((batch, length, n_heads, group, size), dtype), s((batch, length), jnp.int32)
    return q, rows, rows, s(slots, jnp.int32), s(slots, jnp.float32), pos


def whole_prompt(at: Described, n_layers: int = 1) -> jax.stages.Compiled:
    """The program that reads a chunk of a prompt: what is written to the cache is also read by XLA."""
    model = decode_model.abstract("tiny", decode_model.config_of("tiny", n_layers))
    state = jax.eval_shape(lambda: states.init_state(model, Full(), 1, 1024))
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    params, ids, state = at.spread((model.variables, ids, state))
    program = Program.of(model, Full())
    return reading._read.lower(params, ids, ids, state, program=program).compile()


def attention(at: Described, sizes: tuple, dtype=jnp.bfloat16, **options) -> str:
    layer = Layer(*sizes[2:5], RopeConfig(), 0.1, **options)
    run = jax.jit(lambda *args: attend_prompt(*args, layer=layer))
    return run.lower(*at.spread(shapes(*sizes, dtype))).compile().as_text()


def main(device: str) -> None:
    cudnn.check_cudnn_version = lambda: 91200  # described devices have no cuDNN to ask; XLA needs none
    at = Described(device)
    for name in ("whole prompt", *CASES):
        with at.compiling(), dispatch.watch() as taken:
            whole = None if name in CASES else whole_prompt(at)
            text = whole.as_text() if whole else attention(at, CASES[name][0], **CASES[name][1])
        kernels = [call for call in ("__cudnn$fmha", "tpu_custom_call") if call in text]
        found = {"name": name, "kernels": kernels} | taken
        if whole:  # what another layer takes beside its own state
            with at.compiling():
                sizes = [whole_prompt(at, n).memory_analysis().temp_size_in_bytes for n in (2, 5)]
            found["temp_bytes_a_layer"] = (sizes[1] - sizes[0]) / 3
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
