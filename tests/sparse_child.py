"""Compiles steps that leave activations out, and one that learns which, for a described device.

Run by unit/test_sparse_programs.py, since some failures of these compilers end the process.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import optax
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from experiments import decode_model
from kvjax import decoding, states, thresholds
from kvjax.calibrate import refine_thresholds
from kvjax.methods.full import Full
from kvjax.models import quantize
from kvjax.program import Program
from kvjax.sparsity.chess import Chess
from kvjax.sparsity.teal import Teal
from kvjax.thresholds import Site, Threshold
from pallas_kernels import dispatch
from pallas_kernels.topology import Described

CASES = {"dense": None, "chess+": Chess(plus=True), "teal": Teal(), "groups": Chess(plus=True, group=128)}


def sparse(model, method):
    """A model of shapes with thresholds of shapes, as `Thresholds.apply` leaves it."""
    config, level = model.config, jax.ShapeDtypeStruct((), jnp.float32)

    def one(site, statistic):
        weight = jax.ShapeDtypeStruct((site.rows(config),), jnp.float32) if statistic else None
        return Threshold(level, weight, group=method.group)

    layer = {site: one(site, statistic) for site, statistic in method.sites.items()}
    params = model.params
    if Site.FFN_GATE in method.sites:
        turned = {
            k: jax.eval_shape(thresholds._turned, v) for k, v in params.items() if k.startswith("layer_")
        }
        params = params | turned
    return dataclasses.replace(
        model, params=params, thresholds=thresholds.collection([layer] * config.n_layers)
    )


def refinement(at):
    """A step of refinement: the gradient of a prompt, through the library's attention."""
    model, method = decode_model.abstract("tiny", decode_model.config_of("tiny", 2)), CASES["chess+"]
    number = jax.ShapeDtypeStruct((), jnp.float32)
    layer = {str(site): {"level": number} for site in method.sites}
    layer["ffn/act"]["weight"] = jax.ShapeDtypeStruct((model.config.ffn_width,), jnp.float32)
    learner = ([layer, layer], jax.eval_shape(optax.adam(0.1).init, [layer, layer]))
    state = jax.eval_shape(lambda: states.init_state(model, Full(), 2, 512, 512))
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    args = at.spread((model.variables, ids, state, learner, number, number))
    return refine_thresholds._step.lower(*args, program=Program.of(model, Full()), group=1)


def main(device: str) -> None:
    cudnn.check_cudnn_version = lambda: 91200  # described devices have no cuDNN to ask; XLA needs none
    at = Described(device)
    with at.compiling(), dispatch.watch() as taken:
        refinement(at).compile()
    print(json.dumps({"name": "refinement", "codes": False, "taken": taken}), flush=True)
    for codes in (False, True):
        for name, method in CASES.items():
            model = decode_model.abstract("tiny", decode_model.config_of("tiny", 2))
            if codes:
                model = dataclasses.replace(model, params=jax.eval_shape(quantize._quantized, model.params))
            model = model if method is None else sparse(model, method)
            state = jax.eval_shape(lambda model=model: states.init_state(model, Full(), 2, 256))
            ids = jax.ShapeDtypeStruct((2, 1), jnp.int32)
            program = Program.of(model, Full())
            variables, ids, state = at.spread((model.variables, ids, state))
            with at.compiling(), dispatch.watch() as taken:
                decoding._step.lower(variables, ids, ids, state, program=program).compile()
            print(json.dumps({"name": name, "codes": codes, "taken": taken}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
