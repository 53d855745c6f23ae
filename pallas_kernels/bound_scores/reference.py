"""Bounds of scores from their equation, channel by channel: the specification of the kernels."""

import jax.numpy as jnp

__all__ = ["run"]


def run(q, low, high, *, n_blocks, lower):
    """Returns the upper bounds [B N], and with lower the lower ones too."""
    q, low, high = (x.astype(jnp.float32) for x in (q, low, high))
    empty = jnp.any(low > high, axis=-1)
    low, high = (jnp.where(empty[..., None], 0.0, x) for x in (low, high))  # 0·inf is NaN
    uppers, lowers, first = [], [], 0
    for head, n in enumerate(n_blocks):
        here = q[:, head, :, None]  # [B G 1 D]
        ends = [here * x[:, None, first : first + n] for x in (low, high)]  # [B G N D]
        uppers.append(jnp.maximum(*ends).sum(-1).max(1))
        lowers.append(jnp.minimum(*ends).sum(-1).max(1))
        first += n
    upper, least = (jnp.where(empty, -jnp.inf, jnp.concatenate(x, axis=1)) for x in (uppers, lowers))
    return (upper, least) if lower else upper
