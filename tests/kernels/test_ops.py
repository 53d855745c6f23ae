"""Laws over every op and its test specs: the kernels, interpreted, give what the reference gives."""

import jax
import numpy as np
import pytest

from pallas_kernels import backend
from pallas_kernels.backend import Target, aim
from pallas_kernels.registry import ops

# `make test` takes every third of an op's, the long tests the rest.
CASES = [
    pytest.param(op, spec, id=f"{name}-{spec.name}", marks=[pytest.mark.long] if i % 3 else [])
    for name, op in ops().items()
    for i, spec in enumerate(spec for spec in op.specs if "test" in spec.uses)
]
# Backward shows programs that count on those before; forward is what methods are run with, in the laws.
TARGETS = {
    "gpu, programs in reverse": Target("gpu", "interpreted", "backward"),
    "tpu": Target("tpu", "interpreted", "forward"),
}


# Interpreted kernels run once on little: compiling them is what takes time.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled(op, spec, impl):
    """A function of an op's arrays."""
    call = jax.jit(lambda x: op.call(**x, **spec.options(), impl=impl), compiler_options=QUICKLY)
    return lambda arrays: jax.block_until_ready(call(arrays))


def form(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize(("op", "spec"), CASES)
def test_kernels_equal_the_reference_and_nothing_else_does(op, spec):
    """Neither zeros do, nor what the reference gives for inputs of which two are swapped."""
    arrays = spec.arrays(jax.random.key(sum(map(ord, spec.name))))  # of its own for every spec
    reference = compiled(op, spec, "reference")
    expected = reference(arrays)

    def passes(out):
        return op.error(out, expected, arrays | spec.options()) <= spec.limit()

    for name, at in TARGETS.items():
        if op.has_kernel(spec, at.platform):
            with aim(at):
                out = compiled(op, spec, at.platform)(arrays)
            assert not backend.races(), name
            assert form(out) == form(expected), name
            assert passes(out), name
    assert not passes(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), expected))
    for a, b in op.swaps:
        if jax.tree.structure(arrays[a]) == jax.tree.structure(arrays[b]):
            assert not passes(reference(arrays | {a: arrays[b], b: arrays[a]})), (a, b)


@pytest.mark.parametrize("op", ops().values(), ids=ops())
def test_debug_checks_cost_nothing_outside_of_debug(op):
    spec = op.specs[0]  # an effect would make JAX dispatch the program in Python, 100 us an input
    traced = jax.make_jaxpr(lambda x: op.call(**x, **spec.options()))
    assert not traced(jax.eval_shape(spec.arrays, jax.random.key(0))).effects


def test_spec_names_are_unique():
    for op in ops().values():
        assert len({spec.name for spec in op.specs}) == len(op.specs)
