"""LeoAM against its definition, what it must always read, and where it must equal dense attention."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import MODELS, NEW, ONE_LAYER, PROMPTS, run

import kvjax
from kvjax import cache, chunk_tree, host_memory, measure, states, tiers
from kvjax.far_tree import FarTree
from kvjax.methods.leoam import LeoAM
from pallas_kernels.host import on_host

MODEL = MODELS["G2"]
TOTAL = 128 + NEW  # the prompt is padded to a power of two
LAYER = cache.Layer.of(MODEL.config, 0)


def leoam(topk=8, **settings) -> LeoAM:
    return LeoAM(topk, **({"leaf": 4, "root": 16, "window": 6, "n_sinks": 3} | settings))


def filled(n: int, method: LeoAM, slots=(60, 60)) -> cache.KV:
    """The first layer's state of n random tokens, the last of which came by itself."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(1, n, 2, 16)), jnp.float32) for _ in range(2))
    kv, pos = method.for_layer(0, 2).init(LAYER, 1, slots, jnp.float32), jnp.arange(n)[None]
    for part in (slice(0, n - 1), slice(n - 1, n)):
        if part.start < part.stop:
            kv, idx = cache.append(kv, k[:, part], v[:, part], pos[:, part])
            q = jnp.zeros((1, part.stop - part.start, 2, 2, 16))
            kv = method.for_layer(0, 2).observe(kv, q, k[:, part], pos[:, part], idx)
    return kv


def chosen(n: int, method: LeoAM, slots=(60, 60)) -> list[list[int]]:
    """The leaves that each KV head reads for a random query after n tokens."""
    q = jnp.asarray(np.random.default_rng(n).normal(size=(1, 1, 2, 2, 16)), jnp.float32)
    idx = method.for_layer(0, 2).select(filled(n, method, slots), q, jnp.asarray([[n - 1]])).idx
    return [[i for i in row if i >= 0] for row in idx[0].tolist()]


@settings(max_examples=10)  # each compiles
@given(*(st.sampled_from(x) for x in ((1, 7, 40, 0.2), (1, 9, 60), (1, 6, 20), (0, 3, 9), (None, 8))))
def test_the_window_and_the_sinks_are_always_read(topk, n, window, n_sinks, root):
    method = leoam(topk, window=window, n_sinks=n_sinks, root=root)
    for read in chosen(n, method):
        always = {*range(min(n_sinks, n)), *range(max(n - window, 0), n)}
        always = {token // 4 for token in always}
        assert read == sorted(set(read))
        assert set(read) >= always
        assert max(read) <= (n - 1) // 4
        tokens = topk if isinstance(topk, int) else topk * n
        assert len(read) == min(-(-n // 4), len(always) + max(1, int(np.ceil(tokens / 4))))


@pytest.mark.parametrize(
    "changes",
    [
        {"known_by": "box"},
        {"pairs": 2},
        {"known_by": "mean"},
        {"known_by": "box", "pairs": 2},
        {"root": None},
    ],
)
def test_the_leaves_of_largest_bound_are_read(changes):
    method, n = leoam(12, window=1, n_sinks=0, **changes), 57
    kv = filled(n, method)
    q = jnp.asarray(np.random.default_rng(n).normal(size=(1, 1, 2, 2, 16)), jnp.float32)
    turned = np.asarray(kvjax.rope.rotate(q, jnp.full(q.shape[:4], n - 1), LAYER.rope))[0, 0]
    own = method.for_layer(0, 2)
    for head, read in enumerate(chosen(n, method)):
        key, score = np.asarray(kv.k)[0, head * 60 : head * 60 + n], []
        for start in range(0, n, 4):
            parts = [key[i : i + own.shape.box] for i in range(start, min(start + 4, n), own.shape.box)]
            if own.known_by != "box":
                points = [x.mean(0) if own.known_by == "mean" else (x.min(0) + x.max(0)) / 2 for x in parts]
                bound = max((turned[head] @ x).max() for x in points)
            else:
                each = [np.maximum(turned[head] * x.min(0), turned[head] * x.max(0)).sum(-1) for x in parts]
                bound = np.max(each)
            score.append(bound)
        best = np.argsort(-np.asarray(score[:-1]), kind="stable")[:3]  # the last leaf is being written
        assert read == sorted({*best.tolist(), 14})


@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("topk", [TOTAL, 1.0])
def test_reading_all_is_dense_attention(topk, tier):
    dense, _ = run(ONE_LAYER, kvjax.METHODS["full"]())
    ours, _ = run(ONE_LAYER, leoam(topk, tier=tier))
    np.testing.assert_array_equal(ours, dense)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({}, {}),
        ({"pairs": 2, "known_by": "mean"}, {}),
        ({"root": None, "known_by": "middle"}, {"abstracts": "host"}),
        ({"root": None, "known_by": "box"}, {"abstracts": "host"}),
        ({"root": None, "abstract_bits": 8}, {}),
        ({"leaf": 8, "topk": 0.3, "root": None, "pairs": 2, "known_by": "mean"}, {"abstracts": "host"}),
    ],
)
def test_the_host_gives_what_the_device_gives(changes, where):
    device, _ = run(ONE_LAYER, leoam(**changes))
    host, state = run(ONE_LAYER, leoam(**changes, **where, tier="host"))
    np.testing.assert_array_equal(host, device)
    assert tiers.hit_rate(state) > 0.5
    assert state[0].k is None
    assert on_host(state[0].aux) == bool(where)


@pytest.mark.parametrize(
    "changes", [*({"known_by": x} for x in chunk_tree.KINDS), {"root": None, "abstract_bits": 8}]
)
def test_a_tree_that_grew_is_the_one_made_anew(changes):
    method = leoam(**changes)
    for kv in run(ONE_LAYER, method)[1]:
        again = method.for_layer(0, 2).moved(kv, None).aux
        for ours, theirs in zip(*(jax_leaves(x) for x in (kv.aux, again)), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def jax_leaves(tree: chunk_tree.Tree):
    return jax.tree.leaves(tree.replace(begun=None))


def test_heads_of_unequal_slots_are_searched_alike():
    """What a head reads does not depend on the slots of the other."""
    method = leoam(12)
    even, ragged = chosen(30, method), chosen(30, method, (60, 33))
    assert even == ragged
    assert chosen(30, leoam(12, root=None, tier="host", abstracts="host"), (60, 33)) == even


def test_the_tree_saves_evaluations_and_changes_nothing():
    flat, _ = run(ONE_LAYER, leoam(root=None))
    ours, _ = run(ONE_LAYER, leoam(root=8))
    np.testing.assert_array_equal(ours, flat)


def test_for_layer_takes_its_row():
    table = LeoAM(8, leaf=[8, 16], root=np.array([64, 32]), tier="host", device_budget=1000)
    assert hash(table) == hash(LeoAM(8, leaf=(8, 16), root=(64, 32), tier="host", device_budget=1000))
    assert table.for_layer(1, 2) == LeoAM(8, leaf=16, root=32, tier="host", device_budget=500)
    assert LeoAM(8, root=(None, 32)).for_layer(0, 2).root is None
    assert LeoAM(8, known_by=["box", "mean"]).for_layer(1, 2) == LeoAM(8, known_by="mean")
    first = LeoAM(8, dense_layers=1, leaf=(8, 16))
    assert first.for_layer(0, 2) == LeoAM(None)
    assert first.for_layer(1, 2) == LeoAM(8, leaf=16)
    _, state = run(MODEL, leoam(leaf=(4, 8), root=(None, 16), dense_layers=1))
    assert state[0].aux is None
    assert state[1].aux.low.shape == (2, 2 * -(-TOTAL // 8), 16)


def test_a_disk_is_a_tier():
    assert LeoAM(disk="a folder", host_budget=10).tier == "disk"


def device_bytes(kv: cache.KV) -> int:
    """The bytes of a layer's state that lie on the device."""
    far = [kv.tier.far, kv.aux.far if isinstance(kv.aux, FarTree) else None]
    return measure.nbytes(kv) - measure.nbytes(far)


@pytest.mark.parametrize("where", [{}, {"abstracts": "host", "root": None}])
def test_the_device_holds_as_many_lines_as_its_bytes(where):
    method, held = leoam(8, tier="host", **where), {}
    for budget in (None, 120_000):
        own = replace(method, device_budget=budget).for_layer(0, 2)
        kv = own.init(LAYER, 1, (200, 200), jnp.float32)
        held[budget] = kv.tier.held.shape[2]
    assert held[None] == 12
    assert held[120_000] > 12
    line_bytes = 2 * (2 * 4 * 16 * 4 + 8)  # heads; K and V, tokens, channels, float32; what and when
    assert device_bytes(kv) <= 60_000 < device_bytes(kv) + line_bytes


def test_abstracts_on_the_host_count_as_its_memory(monkeypatch):
    method = leoam(tier="host", abstracts="host", root=None)
    far = [(kv.tier.far, kv.aux.far) for kv in states.init_state(MODEL, method, 1, 200)]
    needed = measure.nbytes(far)
    assert needed > measure.nbytes([rows for rows, _ in far])
    monkeypatch.setattr(host_memory, "_free", lambda here: needed)
    states.init_state(MODEL, method, 1, 200)
    monkeypatch.setattr(host_memory, "_free", lambda here: needed - 1)
    with pytest.raises(MemoryError, match="K and V fit into host memory"):
        states.init_state(MODEL, method, 1, 200)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 0}, "topk is tokens, 1 or more"),
        ({"topk": 1.5}, "topk is tokens, 1 or more, or a share"),
        ({"window": 0}, "window is at least 1"),
        ({"n_sinks": -1}, "n_sinks and dense_layers at least 0"),
        ({"dense_layers": -1}, "n_sinks and dense_layers at least 0"),
        ({"pairs": 3}, "a leaf is `pairs` equal parts, got leaf=4, pairs=3"),
        ({"root": 6}, "a root is one or more whole leaves, got root=6, leaf=4"),
        ({"leaf": (4, 8), "root": (8, 12)}, "a root is one or more whole leaves, got root=12, leaf=8"),
        ({"leaf": (4, 8), "root": (8,)}, "leaf, root and known_by have one entry per layer"),
        ({"leaf": ()}, "leaf, root and known_by have one entry per layer"),
        ({"tier": "moon"}, 'K and V lie on the "device", the "host", or a "disk" with its folder'),
        ({"tier": "disk"}, "K and V lie on the .* with its folder, got self.tier='disk', self.disk=None"),
        ({"tier": "host", "device_budget": 0}, "budgets are bytes, 1 or more, or None"),
        ({"disk": "x", "host_budget": -5}, "budgets are bytes, 1 or more, or None"),
        ({"abstracts": "disk", "tier": "host"}, 'abstracts lie on the "device", or on the "host"'),
        ({"abstracts": "host", "tier": "host", "root": None, "abstract_bits": 8}, "self.abstract_bits=8"),
        ({"abstract_bits": 8}, "codes have 8 bits, and are of middles without roots"),
        ({"abstracts": "host", "root": None}, "if K and V are not on the device, got self.abstracts='host'"),
        (
            {"abstracts": "host", "tier": "host"},
            "roots, and abstracts as codes, need abstracts on the device, .* for root=16",
        ),
        ({"device_budget": 9}, "device_budget is for K and V on the host or the disk"),
        ({"tier": "host", "host_budget": 9}, "host_budget for the disk, got .*: leave it out"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        leoam(**changes)


def test_tables_of_another_model_are_refused():
    with pytest.raises(ValueError, match="a table has one entry per layer, got 3 for n_layers=2"):
        kvjax.prefill(MODEL, PROMPTS, leoam(leaf=(4, 4, 8)), room=NEW)


def test_what_cannot_be_held_is_refused():
    with pytest.raises(ValueError, match=f"topk is at most the slots of a head, {TOTAL}, got self.topk=141"):
        kvjax.prefill(MODEL, PROMPTS, leoam(TOTAL + 1), room=NEW)
    with pytest.raises(
        ValueError, match=r"what a step may read, \d* bytes of a layer, got 50: raise"
    ) as told:
        kvjax.prefill(MODEL, PROMPTS, leoam(tier="host", device_budget=100), room=NEW)
    least = int(re.search("[0-9]+", str(told.value))[0])
    _, state = kvjax.prefill(MODEL, PROMPTS, leoam(tier="host", device_budget=2 * least), room=NEW)
    assert [device_bytes(kv) for kv in state] == [least, least]
    with pytest.raises(ValueError, match=f"got {least - 1}: raise"):
        kvjax.prefill(MODEL, PROMPTS, leoam(tier="host", device_budget=2 * least - 1), room=NEW)
