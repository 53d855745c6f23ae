"""rms_norm: its reference against float64, and its rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backend import Target, aim
from pallas_kernels.rms_norm import rms_norm


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_the_reference_equals_the_equation(eps):
    x, scale = jax.random.normal(jax.random.key(0), (3, 50)), jnp.linspace(-1, 2, 50)
    wide, exact = np.float64(x), np.float64(scale)
    expected = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + eps) * exact
    np.testing.assert_allclose(rms_norm(x, scale, eps=eps, impl="reference"), expected, rtol=1e-5, atol=1e-6)


def test_scales_of_another_length_are_refused():
    with pytest.raises(ValueError, match="one scale per channel"):
        rms_norm(jnp.ones((1, 8)), jnp.ones(4), eps=0.0)


def test_rows_that_no_program_holds_are_refused():
    with aim(Target("gpu", "interpreted", "forward")), pytest.raises(NotImplementedError, match="32768"):
        rms_norm(jnp.ones((1, 2**15 + 1)), jnp.ones(2**15 + 1), eps=0.0, impl="gpu")
