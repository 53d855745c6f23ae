"""Finds the chunks of highest bound in a tree by descent into the best roots first.

    U(q) = max_g Σ_d max(q_gd·low_d, q_gd·high_d)     a box's bound, over the query heads of its KV head

A leaf's bound is the largest of its parts'; where these have a mean or a middle, it is the largest product
with that instead, an estimate. No leaf's is above its root's. So when the next root's bound is below the n-th
best leaf's, no leaf that was not evaluated is among the best n.

Source: LeoAM (arXiv 2506.20187), one evaluation for many tokens that do not matter. Deviations: the paper
gives no formulas; ours leaves nothing out that an evaluation of all leaves would find. A root whose lower
bound would take all of its leaves at once did not occur on three models (experiments/leoam_recall.py), so
it is not looked for.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax import cache
from kvjax.chunk_tree import Shape, Tree
from kvjax.vector_codes import absent, products
from pallas_kernels import bound_scores, select_topk

__all__ = ["best", "scores"]

_ROUNDS = 16  # of a descent, at most; each evaluates the leaves of equally many roots


def best(
    tree: Tree, q: Float[Array, "B K G D"], forced: Int[Array, "B K F"], n: int, slots: tuple[int, ...],
    shape: Shape, count: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, "B K N"], Int[Array, "B K"]]:  # fmt: skip
    """Returns the leaves of highest bound of each KV head, and how many chunks were evaluated to find them.

    What is returned is what an evaluation of all leaves would give, the earlier of equal ones included.

    Args:
        q: queries, rotated.
        forced: leaves that are taken in any case, -1 = none.
        n: leaves that are taken beside these, at most.
        count: how many beside these, of each row; None for n.

    Returns: leaves, ascending, then -1: n + F of them, or all of the head with the most, if that is less; and
    the roots and leaves with keys that were evaluated.

    Cost: reads the boxes of all roots, and the parts of the leaves that are evaluated; without roots, of all.

    Example:
        >>> from kvjax.chunk_tree import build
        >>> keys, shape = jnp.arange(16.0).reshape(1, 16, 1), Shape(leaf=2, root=4)
        >>> tree, none = build(keys, jnp.ones((1, 16)), (16,), shape), jnp.full((1, 1, 1), -1)
        >>> [x.tolist() for x in best(tree, jnp.ones((1, 1, 1, 1)), none, 2, (16,), shape)]  # of 4 and 8
        [[[[6, 7, -1]]], [[6]]]
    """
    most = min(n + forced.shape[2], max(shape.n_leaves(slots)))
    idx, evaluated = [], []
    for run in cache.runs(shape.n_leaves(slots)):
        heads = slice(run.head, run.head + run.n)
        b, h = jnp.arange(len(q))[:, None, None], jnp.arange(run.n)[:, None]
        leaf = jnp.where(forced[:, heads] >= 0, forced[:, heads], run.size)
        always = jnp.full((len(q), run.n, run.size), -jnp.inf).at[b, h, leaf].set(jnp.inf, mode="drop")
        limit = (always == jnp.inf).sum(-1) + (n if count is None else count[:, None])
        limit = jnp.minimum(limit, size := min(most, run.size))
        search = _flat if shape.root is None else _descended
        score, made = search(_of(tree, run, slots, shape), q[:, heads], always, limit, size, shape)
        room = ((0, 0), (0, 0), (0, most - size))
        idx.append(jnp.pad(_chosen(score, size, limit), room, constant_values=-1))
        evaluated.append(made)
    return jnp.concatenate(idx, axis=1), jnp.concatenate(evaluated, axis=1)


def scores(
    tree: Tree, q: Float[Array, "B K G D"], slots: tuple[int, ...], shape: Shape
) -> Float[Array, "B N"]:
    """Returns the bound, or the estimate, of every leaf, head after head; -inf for one without keys."""
    found = []
    for run in cache.runs(shape.n_leaves(slots)):
        own = _of(tree, run, slots, shape)
        score = _scores(q[:, run.head : run.head + run.n], own.low, own.high, shape)
        found.append(score.reshape(len(q), -1))
    return jnp.concatenate(found, axis=1)


def _of(tree: Tree, run: cache.Run, slots: tuple[int, ...], shape: Shape) -> Tree:
    """Returns the tree of a run's heads as [B n N·pairs D] and [B n M D].

    run: of leaves.
    """
    parts = run._replace(row=run.row * shape.pairs, size=run.size * shape.pairs)
    n_roots = shape.n_roots(slots)
    roots = cache.Run(run.head, run.n, sum(n_roots[: run.head]), n_roots[run.head])
    low, high = jax.tree.map(lambda x: cache.view(x, parts), (tree.low, tree.high))
    return Tree(low, high, *(cache.view(x, roots) for x in (tree.root_low, tree.root_high)))


def _flat(
    tree: Tree, q: Float[Array, "B n G D"], always: Float[Array, "B n N"],
    limit: Int[Array, "B n"], most: int, shape: Shape,
) -> tuple[Float[Array, "B n N"], Int[Array, "B n"]]:  # fmt: skip
    """Evaluates all leaves; returns their scores, and how many have keys."""
    score = _scores(q, tree.low, tree.high, shape)
    return jnp.maximum(score, always), (score > -jnp.inf).sum(-1, dtype=jnp.int32)


def _descended(
    tree: Tree, q: Float[Array, "B n G D"], always: Float[Array, "B n N"],
    limit: Int[Array, "B n"], most: int, shape: Shape,
) -> tuple[Float[Array, "B n N"], Int[Array, "B n"]]:  # fmt: skip
    """Evaluates the leaves of roots, the best first; returns scores, -inf for leaves that were left out."""
    size, at_once = always.shape[2], -(-tree.root_low.shape[2] // _ROUNDS)
    order, bound, n_roots = _ordered(tree, q, at_once)
    b, h = jnp.arange(len(q))[:, None, None], jnp.arange(q.shape[1])[:, None]

    def wanted(carry: tuple) -> Bool[Array, "B n X"]:
        """Says which of the next roots may have a leaf that is among the best."""
        i, _, threshold, _ = carry
        own = jax.lax.dynamic_slice_in_dim(bound, i * at_once, at_once, axis=2)
        return (own > -jnp.inf) & (own >= threshold[..., None])

    def step(carry: tuple) -> tuple:
        i, score, _, evaluated = carry
        root = jax.lax.dynamic_slice_in_dim(order, i * at_once, at_once, axis=2)[..., None]
        leaf = root * shape.children + jnp.arange(shape.children)
        leaf = jnp.where(wanted(carry)[..., None] & (leaf < size), leaf, size).reshape(*leaf.shape[:2], -1)
        new = _scores(q, *(_taken(x, leaf, shape) for x in (tree.low, tree.high)), shape)
        new = jnp.where(leaf < size, new, -jnp.inf)
        score = score.at[b, h, leaf].max(new, mode="drop")
        evaluated += (new > -jnp.inf).sum(-1, dtype=jnp.int32)
        return i + 1, score, _last(score, most, limit), evaluated

    start = (jnp.int32(0), always, _last(always, most, limit), n_roots)
    _, score, _, evaluated = jax.lax.while_loop(lambda carry: jnp.any(wanted(carry)), step, start)
    return score, evaluated


def _ordered(
    tree: Tree, q: Float[Array, "B n G D"], at_once: int
) -> tuple[Int[Array, "B n M"], Float[Array, "B n M"], Int[Array, "B n"]]:
    """Returns roots by descending bound, these bounds, and how many roots have keys.

    After the last come -inf, to a whole number of rounds and one more. A bound is raised by what it may fall
    short of a leaf's, where both are rounded.
    """
    bound = _bounds(q, tree.root_low, tree.root_high)
    order = jnp.argsort(-bound, axis=-1, stable=True)
    ends = [jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0).max(2) for x in (tree.root_low, tree.root_high)]
    largest = jnp.maximum(*ends).astype(jnp.float32)[:, :, None]  # [B n 1 D]
    size = (jnp.abs(q.astype(jnp.float32)) * largest).sum(-1).max(-1, keepdims=True)
    slack = 2 * q.shape[-1] * float(np.finfo(np.float32).eps) * size
    room = ((0, 0), (0, 0), (0, -bound.shape[2] % at_once + at_once))
    raised = jnp.pad(jnp.take_along_axis(bound, order, -1) + slack, room, constant_values=-jnp.inf)
    return jnp.pad(order, room), raised, (bound > -jnp.inf).sum(-1, dtype=jnp.int32)


def _taken(x: Array | None, leaf: Int[Array, "B n X"], shape: Shape) -> Array | None:
    """Returns the parts of leaves, [B n X·pairs D]; those of some other leaf where there is none."""
    if x is None:
        return None
    part = leaf[..., None] * shape.pairs + jnp.arange(shape.pairs)
    return jnp.take_along_axis(x, part.reshape(*leaf.shape[:2], -1, 1), axis=2, mode="clip")


def _scores(q: Float[Array, "B n G D"], low: Any, high: Array | None, shape: Shape) -> Float[Array, "B n N"]:
    """Returns the bound, or the estimate, of each leaf from its parts [B n N·pairs D], or their codes."""
    if high is None:
        score = jnp.where(absent(low), -jnp.inf, products(q, low).max(2))
    else:
        score = _bounds(q, low, high)
    return score.reshape(*score.shape[:2], -1, shape.pairs).max(-1)


def _bounds(q: Float[Array, "B n G D"], low: Array, high: Array) -> Float[Array, "B n N"]:
    """Returns the bound of each box [B n N D], -inf for one without keys."""
    batch, n, size, _ = low.shape
    low, high = (x.reshape(batch, n * size, -1) for x in (low, high))
    return bound_scores(q, low, high, n_blocks=(size,) * n).reshape(batch, n, size)


def _last(score: Float[Array, "B n N"], most: int, limit: Int[Array, "B n"]) -> Float[Array, "B n"]:
    """Returns the limit-th largest score, -inf where fewer are above that."""
    value = jnp.sort(_values(score, select_topk(score, most)), axis=-1, descending=True)
    return jnp.take_along_axis(value, limit[..., None] - 1, -1)[..., 0]


def _chosen(score: Float[Array, "B n N"], most: int, limit: Int[Array, "B n"]) -> Int[Array, "B n X"]:
    """Returns the leaves of highest score, `limit` of them, ascending and then -1; `most` at most."""
    idx = select_topk(score, most)
    value, last = _values(score, idx), _last(score, most, limit)[..., None]
    above, equal = value > last, value == last
    rank = above.sum(-1, keepdims=True) + jnp.cumsum(equal, axis=-1)
    kept = (idx >= 0) & (above | (equal & (rank <= limit[..., None])))
    idx = jnp.sort(jnp.where(kept, idx, score.shape[2]), axis=-1)
    return jnp.where(idx < score.shape[2], idx, -1)


def _values(score: Float[Array, "B n N"], idx: Int[Array, "B n X"]) -> Float[Array, "B n X"]:
    return jnp.where(idx >= 0, jnp.take_along_axis(score, jnp.maximum(idx, 0), -1), -jnp.inf)
