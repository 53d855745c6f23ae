"""Merges rows by XLA: sums are made for sources alone, so that a pass that merges few needs little memory."""

import jax.numpy as jnp

from pallas_kernels.rotate_rows.reference import turn

__all__ = ["run"]


def run(rows, n, old, into, pos, frequencies, *, form):
    """Returns the rows, n and positions."""
    batch, n_rows = n.shape
    row = jnp.arange(batch)[:, None]
    m = max(form.most, 1)
    nth = jnp.where(into < n_rows, jnp.cumsum(into < n_rows, axis=1) - 1, m)
    source = jnp.full((batch, m), n_rows, jnp.int32)
    source = source.at[row, nth].set(jnp.arange(n_rows, dtype=jnp.int32), mode="drop")
    into = jnp.where(source < n_rows, _take(into, source), n_rows)  # [B M] from here on
    first = jnp.full((batch, n_rows), m, jnp.int32).at[row, into].min(jnp.arange(m), mode="drop")
    leader = jnp.where(into < n_rows, _take(first, into), m)  # the first of those that go into one row
    n_into, n_source = (jnp.where(at < n_rows, _take(n, at), 0.0) for at in (into, source))

    def sums(x, turned=False):
        """Adds up what joins the first of those that go into one row, [B M ...]."""
        a, b = (_take(x, at).astype(jnp.float32) for at in (into, source))
        if turned:
            a, b = (
                turn(y, _take(pos, at), frequencies, True) / form.factor for y, at in ((a, into), (b, source))
            )
        a, b = (_weighted(y, w) for y, w in ((a, n_into), (b, n_source)))
        return a.at[row, leader].add(b, mode="drop")

    total = sums(jnp.ones_like(n))
    means = [sums(x, i == 0 and frequencies is not None) for i, x in enumerate(rows)]
    means = [x / _like(jnp.maximum(total, 1.0), x) for x in means]
    if pos is not None:
        new_pos = jnp.round(sums(pos) / jnp.maximum(total, 1.0)).astype(jnp.int32)
    if frequencies is not None:
        means[0] = turn(means[0], new_pos, frequencies, False) * form.factor
    put = _into_place(old, jnp.where(leader == jnp.arange(m), into, n_rows), n_rows)
    done = tuple(put(x, y) for x, y in zip(rows, means, strict=True))
    return done, put(n, total), None if pos is None else put(pos, new_pos)


def _into_place(old, into, n_rows: int):
    """Returns a function that makes new rows of old ones and of means [B M ...] that replace some."""
    row, (batch, left) = jnp.arange(len(old))[:, None], old.shape
    new = jnp.full((batch, n_rows), left, jnp.int32)
    new = new.at[row, jnp.where(old >= 0, old, n_rows)].set(jnp.arange(left, dtype=jnp.int32), mode="drop")
    at = jnp.where(into < n_rows, _take(new, into), left)

    def put(x, mean):
        kept = jnp.where(_like(old >= 0, x), _take(x, jnp.maximum(old, 0)), 0)
        return kept.at[row, at].set(mean.astype(x.dtype), mode="drop")

    return put


def _take(x, row):
    """Returns rows of x; the last for those out of range."""
    return jnp.take_along_axis(x, _like(jnp.minimum(row, x.shape[1] - 1), x), axis=1)


def _like(x, y):
    return x.reshape(x.shape + (1,) * (y.ndim - 2))


def _weighted(x, weight):
    return jnp.where(_like(weight, x) > 0, _like(weight, x) * x, 0.0)
