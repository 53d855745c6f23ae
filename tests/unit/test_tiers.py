"""Rows in host memory: lines against a plain model of them, equality with the device, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import ONE_LAYER, PROMPTS, codebooks

import kvjax
from kvjax import decoding, host_memory, measure, states, tiers
from kvjax.cache import Layer
from kvjax.methods import per_layer
from kvjax.methods.a2ats import A2ATS
from kvjax.models.config import RopeConfig
from kvjax.program import Program
from kvjax.sampling import Sampling
from pallas_kernels.backend import Target, aim
from pallas_kernels.host import Blocks, Pages, as_pages, as_rows, unpaired

MODEL = ONE_LAYER
BOOKS = codebooks(MODEL)
STEPS = tiers.STEPS + 9  # two programs
RNG = np.random.default_rng(5)
FORCED = RNG.integers(0, 97, (2, STEPS)).astype(np.int32)
TPU = Target("tpu", "described")


def a2ats(**settings) -> A2ATS:
    return A2ATS(**{"topk": 10, "calibration": BOOKS, "far": 64, "window": 8} | settings)


def decoded(method, prompts=PROMPTS, forced=FORCED, **options):
    """Tokens, logits and the state after a prompt in chunks and forced tokens."""
    logits, state = kvjax.prefill(MODEL, prompts, method, room=forced.shape[1], chunk=32)
    options |= {"keep_logits": True}
    tokens, _, state, kept = decoding.decode(MODEL, logits, state, method, forced, **options)
    return np.asarray(tokens), np.asarray(kept), state


@pytest.fixture(scope="module")
def on_device():
    return decoded(a2ats())


@pytest.mark.parametrize("how", [{}, {"hot": 0}, {"host_block": 4, "hot": 150}, {"topk": 1.0}])
def test_the_host_gives_the_bits_of_the_device(how, on_device):
    of_device = decoded(a2ats(topk=1.0)) if "topk" in how else on_device
    _, kept, state = decoded(a2ats(tier="host", **how))
    np.testing.assert_array_equal(kept, of_device[1])
    for kv in state:
        assert kv.tier.far.sharding.memory_kind == "pinned_host"
        assert kv.k is kv.v is None
        others = jax.tree.leaves(kv.replace(tier=kv.tier.replace(far=None)))
        assert {x.sharding.memory_kind for x in others} == {
            MODEL.params["embed"]["embedding"].sharding.memory_kind
        }


def test_the_host_holds_what_the_device_would(on_device):
    _, _, state = decoded(a2ats(tier="host"))
    for kv, other in zip(state, on_device[2], strict=True):
        np.testing.assert_array_equal(kv.tier.first, kv.fill)  # nothing is left staged
        alive = np.asarray(kv.mass) > 0
        for i, rows in enumerate((other.k, other.v)):
            np.testing.assert_array_equal(np.asarray(kv.tier.far)[:, i::2][alive], np.asarray(rows)[alive])


def test_pages_of_a_tpu_give_the_bits_of_the_device(on_device):
    method = a2ats(tier="host", host_block=64)  # a page; the last one of a head is cut short
    with aim(TPU):
        state = states.init_state(MODEL, method, 2, 96 + STEPS)
    logits, state = kvjax.prefill(MODEL, PROMPTS, method, state=state, chunk=32)
    _, _, state, kept = decoding.decode(MODEL, logits, state, method, FORCED, keep_logits=True)
    np.testing.assert_array_equal(kept, on_device[1])
    for kv, other in zip(state, on_device[2], strict=True):
        alive = np.asarray(kv.mass) > 0
        assert isinstance(kv.tier.far, Pages)
        assert kv.tier.far.words.sharding.memory_kind == "pinned_host"
        both = tuple(2 * s for s in kv.slots)
        mine = as_rows(jax.device_put(kv.tier.far, jax.memory.Space.Device), both)
        for i, rows in enumerate((other.k, other.v)):
            np.testing.assert_array_equal(np.asarray(mine)[:, i::2][alive], np.asarray(rows)[alive])


def test_prompts_of_different_lengths_that_go_on_and_stop():
    rows = kvjax.pad([PROMPTS[0][:70].tolist(), PROMPTS[1][:33].tolist()])
    stop = Sampling(stop=(11, 12, 13, 14, 15, 16))
    forced = np.full((2, STEPS), -1, np.int32)

    def both(method):
        logits, state = kvjax.prefill(MODEL, rows, method, room=2 * STEPS, chunk=32)
        logits, state = kvjax.decode_step(MODEL, np.asarray([5, -1]), state, method)
        logits, state = kvjax.prefill(MODEL, PROMPTS[:, :20], method, state=state)
        tokens, logits, state, _ = decoding.decode(MODEL, logits, state, method, forced, sampling=stop)
        return np.asarray(tokens), np.asarray(logits)

    for mine, theirs in zip(both(a2ats(tier="host")), both(a2ats()), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_fewer_steps_than_forced_tokens(on_device):
    for steps in (0, 3, tiers.STEPS, tiers.STEPS + 2):
        tokens, _, state = decoded(a2ats(tier="host"), steps=steps)
        np.testing.assert_array_equal(tokens[:, :steps], FORCED[:, :steps])
        assert (tokens[:, steps:] == -1).all()
        assert np.asarray(state[0].seen).tolist() == [PROMPTS.shape[1] + steps] * 2


def test_codes_of_8_bits_are_within_half_a_step():
    _, _, state = decoded(a2ats(tier="host", host_bits=8), forced=FORCED[:, :1])
    _, _, exact = decoded(a2ats(), forced=FORCED[:, :1])
    kv, other = state[0], exact[0]  # later layers see what the first one read
    alive = np.asarray(kv.mass) > 0
    assert kv.tier.far.codes.sharding.memory_kind == "pinned_host"
    far = unpaired(jax.device_put(kv.tier.far, jax.memory.Space.Device))
    for i, rows in enumerate((other.k, other.v)):
        codes, scale, zero = (
            np.asarray(x, np.float32)[:, i::2][alive] for x in (far.codes, far.scale, far.zero)
        )
        error = np.abs(codes * scale + zero - np.asarray(rows)[alive]) / scale
        assert error.max() <= 0.51


def test_the_bytes_of_the_device_do_not_grow_with_those_of_the_host():
    method = a2ats(tier="host")
    _, state = kvjax.prefill(MODEL, PROMPTS, method, room=300)
    kv = state[0]
    assert measure.nbytes((kv.tier.k, kv.tier.v)) < 0.25 * measure.nbytes(kv.tier.far)
    rows = measure.nbytes([kv.tier.far for kv in state])
    assert measure.host_bytes(state) == rows < measure.nbytes(state)
    assert measure.host_bytes(kvjax.prefill(MODEL, PROMPTS, a2ats(), room=4)[1]) == 0


class Lines:
    """Lines of one head in plain Python: the block of each, and when it was read last."""

    def __init__(self, n):
        self.block, self.used = [-1] * n, [-1] * n

    def read(self, blocks, now):
        """Reads blocks in order; returns how many were not there."""
        for b in blocks:
            if b in self.block:
                self.used[self.block.index(b)] = now
        new = [b for b in blocks if b not in self.block]
        oldest = sorted((u, i) for i, u in enumerate(self.used) if u < now)[: len(new)]
        for b, i in zip(new, sorted(i for _, i in oldest), strict=True):
            self.block[i], self.used[i] = b, now
        return len(new)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), block=st.sampled_from([1, 4, 16]), lines=st.integers(6, 14))
def test_lines_hold_what_was_read_and_lose_what_was_read_longest_ago(seed, block, lines):
    rng, paged = np.random.default_rng(seed), block == 16
    slots, size, n = ((160, 104), 128, 6) if paged else ((40, 26), 8, 6)
    both = tuple(2 * s for s in slots)
    rows = jnp.asarray(rng.normal(size=(1, sum(both), size)), jnp.float32)
    far = as_pages(rows, Blocks(both, 2 * block)) if paged else rows
    how = tiers.Host(lines=lines, block=block)
    tier = tiers.empty(1, slots, size, jnp.float32, how)
    tier = tier.replace(far=far, first=jnp.asarray([slots], jnp.int32))
    bring = jax.jit(tiers.bring, static_argnames="slots")
    models, missed = [Lines(lines) for _ in slots], 0
    for now in range(1, 12):
        idx = np.full((1, 2, n), -1)
        for k, s in enumerate(slots):
            chosen = np.sort(rng.permutation(min(10, -(-s // block)))[: rng.integers(0, n + 1)])
            idx[0, k, : len(chosen)] = chosen
        tier, line = bring(tier, jnp.asarray(idx), jnp.asarray([now]), slots=slots)
        for k, model in enumerate(models):
            blocks = [b for b in idx[0, k] if b >= 0]
            missed += model.read(blocks, now)
            held, used = np.asarray(tier.held)[0, k], np.asarray(tier.used)[0, k]
            assert (held.tolist(), used.tolist()) == (model.block, model.used)
            assert [held[i] for i in np.asarray(line)[0, k] if i >= 0] == blocks
            assert (used[[i for i in np.asarray(line)[0, k] if i >= 0]] == now).all()
            for at, b in zip(np.asarray(line)[0, k], idx[0, k], strict=True):
                if b < 0:
                    continue
                first = sum(slots[:k]) + b * block
                full = min(block, slots[k] - b * block)
                here = k * lines * block + at * block
                for i, lies in enumerate((tier.k, tier.v)):
                    of_host = rows[0, i::2][first : first + full]
                    np.testing.assert_array_equal(lies[0, here : here + full], of_host)
    assert int(tier.missed.sum()) == missed
    assert len({b for b in np.asarray(tier.held)[0, 0] if b >= 0}) == (np.asarray(tier.held)[0, 0] >= 0).sum()


def test_a_step_that_reads_more_than_the_lines_is_refused():
    tier = tiers.empty(1, (40,), 8, jnp.float32, tiers.Host(lines=4))
    with pytest.raises(ValueError, match="got 6 blocks for 4 lines: have more"):
        tiers.bring(tier, jnp.zeros((1, 1, 6), jnp.int32), jnp.zeros(1, jnp.int32), (40,))


def test_more_tokens_than_are_staged_are_refused():
    tier = tiers.empty(1, (200,), 8, jnp.float32, tiers.Host(lines=4))
    rows = jnp.zeros((1, 1, 70, 8))
    with pytest.raises(ValueError, match="got 70 for room=64"):
        tiers.stage(tier, jnp.zeros((1, 1, 70), jnp.int32), rows, rows)


def test_staged_rows_that_overflow_are_an_error_in_debug_mode():
    method = a2ats(tier="host")
    _, state = kvjax.prefill(MODEL, PROMPTS, method, room=200)
    step = kvjax.debug(
        lambda s: decoding._step(
            MODEL.variables, FORCED[:, :1], s[0].seen[:, None], s, program=Program.of(MODEL, method)
        )
    )
    for _ in range(tiers.STEPS):
        _, state = step(state)
    with pytest.raises(ValueError, match="staged rows overflow: flush them"):  # there was none in between
        step(state)


def test_too_little_host_memory_is_told_before_anything_is_allocated(monkeypatch):
    init = states._init
    monkeypatch.setattr(host_memory, "_free", lambda here: 10_000)
    made = []
    monkeypatch.setattr(
        states, "_init", lambda *args: made.append(isinstance(jnp.ones(1), jax.core.Tracer)) or init(*args)
    )
    with pytest.raises(MemoryError, match=r"got 0\.0 GiB for 0\.0 GiB that are free"):
        states.init_state(MODEL, a2ats(tier="host"), 2, 200)
    assert made
    assert all(made)  # shapes alone


def test_free_memory_is_the_least_of_the_machine_and_the_control_group(monkeypatch):
    files = {
        "/proc/meminfo": ["MemTotal: 9000 kB", "MemAvailable:    5000 kB"],
        "/sys/fs/cgroup/memory.max": ["4000000"],
        "/sys/fs/cgroup/memory.current": ["1000000"],
    }
    monkeypatch.setattr(host_memory, "_lines", lambda path: files.get(path, []))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert host_memory._free(0) == 3_000_000
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert host_memory._free(0) == 5_120_000
    files.clear()
    assert host_memory._free(0) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "100")
    assert host_memory._free(2 << 30) == 98 << 30


def test_what_xla_has_pinned_for_rows_that_are_gone_is_free(monkeypatch):
    free = {"kB": 1000}
    lines = lambda path: [f"MemAvailable: {free['kB']} kB"] if path == "/proc/meminfo" else []  # noqa: E731
    monkeypatch.setattr(host_memory, "_lines", lines)
    monkeypatch.setattr(host_memory._Pinned, "most", 0)
    here, before = host_memory._here, host_memory._here()
    monkeypatch.setattr(host_memory, "_here", lambda: here() - before)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    make = lambda: states.init_state(MODEL, a2ats(tier="host"), 2, 200)  # noqa: E731
    state = make()
    assert measure.host_bytes(state) == host_memory._here() > 0
    free["kB"] = 0
    with pytest.raises(MemoryError):  # a second one
        make()
    del state
    make()  # in the place of the first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tier": "disk"}, r'on the "device" or the "host".*got self.tier=\'disk\''),
        ({"tier": "host", "host_bits": 4}, "got self.tier='host', self.host_bits=4"),
        ({"tier": "host", "host_block": 0}, "self.host_block=0"),
    ],
)
def test_settings_of_the_tier_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        a2ats(**settings)


def test_fewer_hot_tokens_than_a_step_reads_are_refused():
    method = per_layer(a2ats(tier="host", hot=20), MODEL.config)[0]
    layer = Layer(2, 2, 16, RopeConfig(), 0.25)
    with pytest.raises(ValueError, match=r"at least what a step may read, 36, got self.hot=20"):
        method.init(layer, 1, (100, 100), jnp.float32)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"host_block": 32}, ValueError, "pages of 8 KiB.*blocks of 64 rows of 64 bytes.*multiple of 128"),
        ({"host_block": 128, "host_bits": 8}, NotImplementedError, r"got how\.bits=8: take None"),
    ],
)
def test_what_a_tpu_cannot_keep_on_the_host_is_refused(settings, error, message):
    with aim(TPU), pytest.raises(error, match=message):
        states.init_state(MODEL, a2ats(tier="host", **settings), 1, 200)


def test_a_method_of_a_chain_keeps_its_rows_on_the_device():
    with pytest.raises(ValueError, match=r'take tier="device"'):
        kvjax.chain(a2ats(tier="host"), kvjax.METHODS["quest"](budget=32, dense_layers=0))


def test_lines_of_other_blocks_than_a_selection_are_refused():
    method = a2ats(tier="host", host_block=4)
    _, state = kvjax.prefill(MODEL, PROMPTS, method, room=4)
    kv = state[0]
    chosen = kvjax.attend.Selection(idx=jnp.zeros((2, 2, 3), jnp.int32), block=3)
    with pytest.raises(ValueError, match=r"got block=4, selection\.block=3"):
        kvjax.attend.held(kv, jnp.zeros((2, 1), jnp.int32), chosen)
