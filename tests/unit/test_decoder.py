"""What the decoder does otherwise on a GPU gives the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.models import linear
from pallas_kernels.backend import Target, aim

GPU = Target("gpu", "as XLA sees it")


def product(shape, kernel):
    x = jax.random.normal(jax.random.key(0), shape, kernel.dtype)
    with aim(GPU):
        traced = jax.make_jaxpr(lambda x, kernel: linear._product(x, kernel))  # noqa: PLW0108  traced anew
        return x, linear._product(x, kernel), str(traced(x, kernel))


@pytest.mark.parametrize("shape", [(1, 1, 24), (1, 2, 24), (3, 1, 24)])
def test_a_lone_row_is_multiplied_as_a_product(shape):
    kernel = jax.random.normal(jax.random.key(1), (24, 16))
    x, out, program = product(shape, kernel)
    assert ("pad" in program) == (shape[0] * shape[1] == 1)
    np.testing.assert_allclose(out, np.einsum("btm,mf->btf", *map(np.float64, (x, kernel))), atol=1e-5)


def test_a_large_kernel_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(linear, "_SMALL", 24 * 16)
    assert "pad" not in product((1, 1, 24), jnp.ones((24, 16)))[2]
