"""Simulated lines against plain Python, and against the counters of the tier itself."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import MODELS, PROMPTS, codebooks

import kvjax
from experiments import lru, selections
from experiments.selections import Steps
from kvjax import decoding, disk, tiers
from kvjax.methods.a2ats import A2ATS
from kvjax.methods.leoam import LeoAM

RNG = np.random.default_rng(3)
N_REST = 2 * tiers.STEPS  # two programs
DOCUMENTS = np.concatenate([PROMPTS, RNG.integers(0, 97, (2, N_REST))], axis=1).astype(np.int32)


def random_steps(seed: int, size: int = 30, n: int = 7, n_steps: int = 40) -> Steps:
    """Steps that read what is near to what the last one read, from a text that grows past the staged rows."""
    rng = np.random.default_rng(seed)
    seen = np.minimum(10 + np.arange(n_steps), size)
    slot = np.full((2, 3, n_steps, n), -1)
    for at in np.ndindex(2, 3, n_steps):
        liked = np.argsort(rng.random(seen[at[2]]) * (1 + np.arange(seen[at[2]]) % 4))
        chosen = np.sort(liked[: rng.integers(0, n + 1)])
        slot[at][: len(chosen)] = chosen
    return Steps(slot, seen, 8 + np.arange(n_steps) // 6 * 6, size)


def remembered(steps: Steps, block: int, lines: int) -> np.ndarray:
    """What crosses the bus in each step, by a dict in the order in which blocks were read."""
    missed = np.zeros(len(steps.seen), int)
    for b, k in np.ndindex(steps.slot.shape[:2]):
        cache = OrderedDict()
        for t, first in enumerate(steps.first):
            read = sorted({s // block for s in steps.slot[b, k, t] if s >= 0})
            missed[t] += sum(x not in cache and x * block < first for x in read)
            for x in read:
                cache[x] = None
                cache.move_to_end(x)
            while len(cache) > lines:
                cache.popitem(last=False)
    return missed


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), block=st.sampled_from([1, 4]))
def test_one_pass_counts_for_any_number_of_lines(seed, block):
    steps = random_steps(seed)
    missed = lru.lru_missed(steps, block)
    assert missed.shape == (40, steps.n_blocks(block) + 1)
    for lines in range(missed.shape[1]):
        np.testing.assert_array_equal(missed[:, lines], remembered(steps, block, lines))
    assert missed[:, 0].sum() > missed[:, 4].sum() > missed[:, -1].sum() > 0


def test_reads_that_do_not_count_take_lines_all_the_same():
    steps = random_steps(0)
    late = steps.slot >= 9
    parts = [lru.lru_missed(steps, 1, only) for only in (late, ~late)]
    np.testing.assert_array_equal(sum(parts), lru.lru_missed(steps, 1))
    assert all(part.sum() for part in parts)


def test_with_lines_to_spare_the_policies_are_one():
    steps = random_steps(1)
    tier = lru.tier_missed(steps, 1, steps.size + 7)  # of the 7 used longest ago, all are free
    np.testing.assert_array_equal(tier.sum((0, 1)), lru.lru_missed(steps)[:, -1])
    assert lru.tier_missed(steps, 1, 9).sum() > tier.sum()


def test_fewer_lines_than_a_tier_has_are_refused():
    steps = random_steps(0)
    assert [lru.needed_lines(steps, block) for block in (1, 5)] == [7, 6]
    with pytest.raises(ValueError, match=r"that a step may read, 7, got \(lines=6\): take more"):
        lru.tier_missed(steps, 1, 6)


def test_chunks_of_all_heads_are_asked_for_once_a_step():
    steps, block, chunk, lines = random_steps(2), 2, 4, 9
    crossed = lru.tier_crossed(steps, block, lines)
    asked = lru.asked_chunks(steps, block, crossed, chunk)
    np.testing.assert_array_equal(crossed.sum(-1), lru.tier_missed(steps, block, lines))
    n_chunks = -(-steps.size // chunk)
    assert asked.size == asked.n_blocks(1) == 3 * n_chunks
    for b, t in np.ndindex(2, len(steps.seen)):
        wanted = set()
        for k, n in zip(*np.nonzero(crossed[b, :, t]), strict=True):
            number = steps.slot[b, k, t, n] // chunk
            if (number + 1) * chunk <= steps.first[t]:  # else it lies in memory alone
                wanted.add(k * n_chunks + number)
        found = asked.slot[b, 0, t]
        assert sorted(found[found >= 0]) == sorted(wanted)
    assert lru.lru_missed(asked)[:, -1].sum() < (asked.slot >= 0).sum()  # some are asked for again


def a2ats(model: kvjax.Model, **more) -> A2ATS:
    return A2ATS(topk=10, calibration=codebooks(model), far=64, window=8, **more)


@pytest.fixture(scope="module")
def recorded():
    """What each model's steps read."""
    return {name: selections.record(model, a2ats(model), DOCUMENTS, N_REST) for name, model in MODELS.items()}


def counted(model: kvjax.Model, **how) -> list[dict[int, tuple[np.ndarray, np.ndarray, int]]]:
    """The tier's own counters [B K] of blocks read and missed, and its lines, of each layer and program."""
    method, found = a2ats(model, tier="host", **how), []
    logits, state = kvjax.prefill(model, PROMPTS, method, room=N_REST)
    for start in range(0, N_REST, tiers.STEPS):
        forced = DOCUMENTS[:, PROMPTS.shape[1] + start :][:, : tiers.STEPS]
        _, logits, state, _ = decoding.decode(model, logits, state, method, forced)
        tier = {i: kv.tier for i, kv in enumerate(state) if kv.tier is not None}
        found.append(
            {i: (np.asarray(t.read), np.asarray(t.missed), t.held.shape[2]) for i, t in tier.items()}
        )
    return found


@pytest.mark.parametrize(
    ("name", "block", "hot"), [("G2", 1, 40), ("G2", 1, 150), ("G2", 4, 150), ("G1 with a window", 1, 30)]
)
def test_simulated_lines_count_what_the_tier_counts(name, block, hot, recorded):
    steps, programs = recorded[name], counted(MODELS[name], host_block=block, hot=hot)
    for i, found in steps.items():
        read = (found.blocks(block) >= 0).sum(-1)
        missed = lru.tier_missed(found, block, programs[0][i][2])
        for n, program in enumerate(programs, 1):
            for counter, mine in zip(program[i], (read, missed), strict=False):
                np.testing.assert_array_equal(counter, mine[:, :, : n * tiers.STEPS].sum(-1))
        assert 0 < missed[:, :, tiers.STEPS :].sum() < read.sum()
    assert all(program.keys() == steps.keys() for program in programs)


def test_no_lines_are_a_tier_that_keeps_none(recorded):
    program = counted(MODELS["G2"], hot=0)[-1]
    for i, found in recorded["G2"].items():
        assert program[i][1].sum() == lru.lru_missed(found)[:, 0].sum() > 0


def test_simulated_chunks_are_those_that_a_disk_is_asked_for(tmp_path):
    model, chunk = MODELS["G2"], 16
    settings = {"topk": 24, "leaf": 8, "window": 16, "n_sinks": 4}
    steps = selections.record(model, LeoAM(**settings), DOCUMENTS, N_REST)
    method = LeoAM(**settings, disk=str(tmp_path), chunk=chunk, ahead=False)
    for row in range(2):  # a document each, as recorded
        logits, state = kvjax.prefill(model, PROMPTS[row : row + 1], method, room=N_REST)
        before = disk.traffic(state)
        before = [t.asked for t in before]
        for start in range(0, N_REST, tiers.STEPS):
            forced = DOCUMENTS[row : row + 1, PROMPTS.shape[1] + start :][:, : tiers.STEPS]
            _, logits, state, _ = decoding.decode(model, logits, state, method, forced)
        lines = state[0].tier.held.shape[2]
        counts = [t.asked - n for t, n in zip(disk.traffic(state), before, strict=True)]
        crossed = [lru.tier_crossed(s, 8, lines) for s in steps.values()]
        both = zip(steps.values(), crossed, strict=True)
        asked = [lru.asked_chunks(s, 8, x, chunk).slot[row] >= 0 for s, x in both]
        assert counts == [int(x.sum()) for x in asked]
        assert min(counts) > 0
