"""Compiles decode loops of few and of more layers for a described H100, and prints what they need.

usage: python step_child.py METHOD ...     a JSON line each. Run by unit/test_step_programs.py.
"""

import json
import sys

import jax
import jax.numpy as jnp

from experiments import decode_model
from kvjax import decoding, measure, spec, states
from kvjax.program import Program
from kvjax.sampling import Sampling
from pallas_kernels.topology import Described

LAYERS, SLOTS = (2, 6), 1024


def decode_loop(at: Described, method, n_layers: int) -> tuple[jax.stages.Compiled, int]:
    """The program of `decode`, and the bytes of its state."""
    model = decode_model.abstract("tiny", decode_model.config_of("tiny", n_layers))
    state = jax.eval_shape(lambda: states.init_state(model, method, 2, SLOTS))
    logits = jax.ShapeDtypeStruct((2, model.config.vocab_size), jnp.float32)
    forced, steps = jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    limits = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, Sampling().limits()))
    args = at.spread((model.variables, logits, state, forced, steps, limits))
    options = {"program": Program.of(model, method), "keep_logits": False}
    with at.compiling():
        return decoding._decode.lower(*args, **options).compile(), measure.nbytes(state)


def main(*methods: str) -> None:
    at = Described("h100")
    for name in methods:
        programs = [decode_loop(at, spec.parse(name), n) for n in LAYERS]
        temps, sizes = zip(*((c.memory_analysis().temp_size_in_bytes, n) for c, n in programs), strict=True)
        print(json.dumps({"name": name, "temp_bytes": temps, "state_bytes": sizes}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
