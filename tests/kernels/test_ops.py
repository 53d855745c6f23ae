"""Laws over every op and its test specs: the kernels, interpreted, give what the reference gives."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels import backend
from pallas_kernels.backend import Target, aim
from pallas_kernels.registry import ops

CASES = [
    pytest.param(op, spec, id=f"{name}-{spec.name}")
    for name, op in ops().items()
    for spec in op.specs
    if "test" in spec.uses
]
# Backward shows programs that count on those before; forward is what methods are run with, in the laws.
TARGETS = {
    "gpu, programs in reverse": Target("gpu", "interpreted", "backward"),
    "tpu": Target("tpu", "interpreted", "forward"),
}


# Interpreted kernels run once on little: compiling them is what takes time.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def run(op, spec, arrays, impl):
    call = jax.jit(lambda x: op.call(**x, **spec.options(), impl=impl), compiler_options=QUICKLY)
    return jax.block_until_ready(call(arrays))


@functools.lru_cache(4)
def expected(op, spec):
    """Fresh inputs for every spec, as the seed is its name, and what the reference makes of them."""
    arrays = spec.arrays(jax.random.key(sum(map(ord, spec.name))))
    return arrays, run(op, spec, arrays, "reference")


@pytest.mark.parametrize("at", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("op", "spec"), CASES)
def test_kernel_equals_the_reference(op, spec, at):
    if not op.has_kernel(spec, at.platform):
        pytest.skip("the reference runs there")
    arrays, reference = expected(op, spec)
    with aim(at):
        out = run(op, spec, arrays, at.platform)
    assert not backend.races()
    form = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert form(out) == form(reference)
    assert op.error(out, reference, arrays | spec.options()) <= spec.limit()


@pytest.mark.parametrize(("op", "spec"), CASES)
def test_the_measure_fails_on_zeros(op, spec):
    arrays, reference = expected(op, spec)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), reference)
    assert op.error(zeros, reference, arrays | spec.options()) > spec.limit()


@pytest.mark.parametrize(("op", "spec"), [case for case in CASES if case.values[0].swaps])
def test_the_measure_fails_on_swapped_inputs(op, spec):
    arrays, reference = expected(op, spec)
    for a, b in op.swaps:
        if jax.tree.structure(arrays[a]) == jax.tree.structure(arrays[b]):
            swapped = run(op, spec, arrays | {a: arrays[b], b: arrays[a]}, "reference")
            assert op.error(swapped, reference, arrays | spec.options()) > spec.limit()


@pytest.mark.parametrize("op", ops().values(), ids=ops())
def test_debug_checks_cost_nothing_outside_of_debug(op):
    spec = op.specs[0]  # an effect would make JAX dispatch the program in Python, 100 us an input
    traced = jax.make_jaxpr(lambda x: op.call(**x, **spec.options()))
    assert not traced(jax.eval_shape(spec.arrays, jax.random.key(0))).effects


def test_spec_names_are_unique():
    for op in ops().values():
        assert len({spec.name for spec in op.specs}) == len(op.specs)
