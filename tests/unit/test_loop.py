"""The decode loop: how many steps run between two looks at the end changes nothing."""

import jax
import numpy as np
import pytest
from tiny_models import tiny

import kvjax
from kvjax import loop
from kvjax.methods.full import Full
from kvjax.sampling import Sampling
from pallas_kernels.backend import Target

MODEL = tiny()
PROMPTS = [[3, 7, 9, 11], [5, 6]]
FORCED = np.array([[-1, -1, -1, -1, -1, 4, -1], [-1, 8, -2, -1, -1, -1, -1]], np.int32)


def decode(steps, sampling):
    logits, state = kvjax.prefill(MODEL, kvjax.pad(PROMPTS), room=9)
    out = kvjax.decode(MODEL, logits, state, Full(), FORCED, steps=steps, sampling=sampling, keep_logits=True)
    tokens, last, state, kept = jax.tree.map(np.asarray, out)
    return tokens, last, state, kept[:, :steps]


@pytest.fixture
def in_threes(monkeypatch):
    """A GPU's loop, which here runs the same products: three steps at once."""

    def use():
        monkeypatch.setattr(loop, "_AT_ONCE", 3)
        monkeypatch.setattr(loop, "target", lambda: Target("gpu", "as the loop sees it"))
        loop._decode.clear_cache()

    yield use
    loop._decode.clear_cache()


@pytest.mark.parametrize("steps", [None, 2, 4, 7])
def test_a_step_beyond_the_end_changes_nothing(in_threes, steps):
    greedy = decode(steps, Sampling())
    stop = Sampling(stop=(int(greedy[0][0, 1]),))  # the second token of the first row ends it
    for sampling in (Sampling(), stop, Sampling(temperature=1.0, seed=3)):
        loop._decode.clear_cache()
        expected = decode(steps, sampling)
        in_threes()
        got = decode(steps, sampling)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_the_loop_of_a_gpu_looks_up_rarely(in_threes):
    in_threes()
    program = loop.Program.of(MODEL, Full())
    state = jax.eval_shape(lambda: loop.init_state(MODEL, Full(), 2, 16))
    lowered = loop._decode.lower(
        MODEL.params, np.zeros((2, 256), np.float32), state, FORCED, np.int32(7), Sampling().limits(),
        program=program, keep_logits=False,
    )  # fmt: skip
    assert lowered.as_text().count("stablehlo.while") == 2, "a loop of three steps in a loop that asks"
