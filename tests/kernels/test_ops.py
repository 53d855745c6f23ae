"""Laws over every op and its test specs: the kernels, interpreted, give what the reference gives."""

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
TARGETS = {
    "gpu": Target("gpu", "interpreted", "forward"),
    "gpu, programs in reverse": Target("gpu", "interpreted", "backward"),
    "tpu": Target("tpu", "interpreted", "forward"),
}


def inputs(spec):
    """Fresh inputs for every spec: the seed is its name."""
    return spec.arrays(jax.random.key(sum(map(ord, spec.name))))


@pytest.mark.parametrize("at", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("op", "spec"), CASES)
def test_kernel_equals_the_reference(op, spec, at):
    arrays = inputs(spec)
    expected = op.call(**arrays, **spec.options(), impl="reference")
    with aim(at):
        out = op.call(**arrays, **spec.options(), impl=at.platform)
    assert not backend.races()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), out) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    assert op.error(out, expected, arrays | spec.options()) <= spec.limit()


@pytest.mark.parametrize(("op", "spec"), CASES)
def test_the_measure_fails_on_zeros(op, spec):
    arrays = inputs(spec)
    expected = op.call(**arrays, **spec.options(), impl="reference")
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), expected)
    assert op.error(zeros, expected, arrays | spec.options()) > spec.limit()


@pytest.mark.parametrize(("op", "spec"), [case for case in CASES if case.values[0].swaps])
def test_the_measure_fails_on_swapped_inputs(op, spec):
    arrays = inputs(spec)
    expected = op.call(**arrays, **spec.options(), impl="reference")
    for a, b in op.swaps:
        if jax.tree.structure(arrays[a]) == jax.tree.structure(arrays[b]):
            swapped = op.call(**arrays | {a: arrays[b], b: arrays[a]}, **spec.options(), impl="reference")
            assert op.error(swapped, expected, arrays | spec.options()) > spec.limit()


def test_spec_names_are_unique():
    for op in ops().values():
        assert len({spec.name for spec in op.specs}) == len(op.specs)
