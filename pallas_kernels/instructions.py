"""Gives Pallas Triton single instructions of GPUs where the compiler would take several.

It multiplies and adds in two, since fusing changes the rounding, and its exponential and logarithm
are a library's, right to the last bit. Interpreted kernels compute the same plainly.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backend import target, triton

__all__ = ["assemble", "exp2", "log2", "multiply_add", "nearest"]


def assemble(
    code: str,
    *args: jax.Array,
    plain: Callable[..., jax.Array],
    dtype: Any,
    constraints: str,
    pack: int,
) -> jax.Array:
    """Returns what PTX makes of arrays, element by element, after broadcasting them.

    Args:
        code: with operands $0, $1, ..: the results first.
        plain: what it computes, for the interpreter.
        dtype: of the result.
        constraints: registers of the operands, as LLVM writes them.
        pack: elements that one run of the code takes from each array.
    """
    shape = jnp.broadcast_shapes(*(x.shape for x in args))
    args = tuple(jnp.broadcast_to(x, shape) for x in args)
    if target().interpret is not None:
        return plain(*args)
    out = [jax.ShapeDtypeStruct(shape, dtype)]
    options = {"constraints": constraints, "pack": pack, "result_shape_dtypes": out}
    return triton.elementwise_inline_asm(code, args=args, **options)[0]


def exp2(x: jax.Array) -> jax.Array:
    """Returns 2^x of float32, right to 2 ulp."""
    options = {"dtype": jnp.float32, "constraints": "=f,f", "pack": 1}
    return assemble("ex2.approx.ftz.f32 $0, $1;", x, plain=jnp.exp2, **options)


def log2(x: jax.Array) -> jax.Array:
    """Returns the base-2 logarithm of positive float32, to an absolute error of 2^-22."""
    options = {"dtype": jnp.float32, "constraints": "=f,f", "pack": 1}
    return assemble("lg2.approx.ftz.f32 $0, $1;", x, plain=jnp.log2, **options)


def multiply_add(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Returns a·b + c in float32; a may be bfloat16, which becomes float32 on the way."""
    plain = lambda a, b, c: a.astype(jnp.float32) * b + c  # noqa: E731
    if a.dtype == jnp.bfloat16:
        code = """{
            .reg .b32 low, high;
            shl.b32 low, $2, 16;
            and.b32 high, $2, 0xffff0000;
            fma.rn.f32 $0, low, $3, $5;
            fma.rn.f32 $1, high, $4, $6;
        }"""
        options = {"constraints": "=&f,=&f,r,f,f,f,f", "pack": 2}
    else:
        a, code = a.astype(jnp.float32), "fma.rn.f32 $0, $1, $2, $3;"
        options = {"constraints": "=f,f,f,f", "pack": 1}
    return assemble(code, a, b, c, plain=plain, dtype=jnp.float32, **options)


def nearest(x: jax.Array) -> jax.Array:
    """Returns the nearest whole numbers to float32, the even one of two."""
    options = {"dtype": jnp.float32, "constraints": "=f,f", "pack": 1}
    return assemble("cvt.rni.f32.f32 $0, $1;", x, plain=jnp.round, **options)
