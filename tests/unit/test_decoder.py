"""What the decoder does otherwise on a GPU gives the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import tiny

import kvjax
from kvjax.models import decoder
from pallas_kernels import dispatch
from pallas_kernels.backend import Target, aim, jit_side_by_side

GPU = Target("gpu", "as XLA sees it")


def product(shape, kernel):
    x = jax.random.normal(jax.random.key(0), shape, kernel.dtype)
    with aim(GPU):
        traced = jax.make_jaxpr(lambda x, kernel: decoder._product(x, kernel))  # noqa: PLW0108  traced anew
        return x, decoder._product(x, kernel), str(traced(x, kernel))


@pytest.mark.parametrize("shape", [(1, 1, 24), (1, 2, 24), (3, 1, 24)])
def test_a_lone_row_is_multiplied_as_a_product(shape):
    kernel = jax.random.normal(jax.random.key(1), (24, 16))
    x, out, program = product(shape, kernel)
    assert ("pad" in program) == (shape[0] * shape[1] == 1)
    np.testing.assert_allclose(out, np.einsum("btm,mf->btf", *map(np.float64, (x, kernel))), atol=1e-5)


def test_a_large_kernel_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(decoder, "_SMALL", 24 * 16)
    assert "pad" not in product((1, 1, 24), jnp.ones((24, 16)))[2]


@pytest.mark.parametrize("shape", [(1, 1, 24), (1, 2, 24), (3, 1, 24)])
def test_a_lone_row_is_normalised_in_one_kernel(shape):
    x, scale = 3 * jax.random.normal(jax.random.key(0), shape), jnp.linspace(0.5, 2, 24)
    with aim(Target("gpu", "interpreted", "forward")), dispatch.watch() as taken:
        out = decoder.Norm(1e-5).apply({"params": {"scale": scale}}, x)
    assert taken == ({"rms_norm": "gpu"} if shape[0] * shape[1] == 1 else {})
    x, scale = np.float64(x), np.float64(scale)
    np.testing.assert_allclose(out, x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale, atol=1e-5)


def test_steps_can_be_part_of_another_program():
    model, ids, token = tiny(2), np.array([[3, 5, 7]], np.int32), jnp.array([4])

    def step(state):
        return kvjax.decode_step(model, token, state)[0]

    alone, within = (run(kvjax.prefill(model, ids, room=1)[1]) for run in (step, jax.jit(step)))
    np.testing.assert_allclose(within, alone, atol=1e-5)


def test_only_a_program_by_itself_is_compiled_with_options():
    double = jit_side_by_side(static_argnames="n")(lambda x, *, n: n * x)
    assert (double(3.0, n=2), jax.jit(lambda x: double(x, n=2))(4.0), jax.grad(double)(5.0, n=2)) == (6, 8, 2)
    with pytest.raises(ValueError, match="compiler_options"):
        jax.jit(lambda x: double._whole(x, n=2))(3.0)
