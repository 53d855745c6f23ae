"""Rotates by XLA, in float32."""

import jax.numpy as jnp

__all__ = ["rotated", "run", "turn"]


def run(x, pos, frequencies, *, factor: float, back: bool):
    """Returns the rows."""
    out = turn(x.astype(jnp.float32), pos, frequencies, back)
    return (out / factor if back else out * factor).astype(x.dtype)


def turn(x, pos, frequencies, back: bool):
    """Rotates rows of float32 [... D], or back."""
    angle = pos[..., None].astype(jnp.float32) * frequencies
    return rotated(x, jnp.cos(angle), jnp.sin(-angle if back else angle))


def rotated(x, cos, sin):
    """Rotates rows of float32 [... D] by angles of these cosines and sines [... D/2]."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
