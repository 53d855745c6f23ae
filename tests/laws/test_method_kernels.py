"""Every method gives with kernels, interpreted, what it gives with the references."""

import functools

import method_cases
import numpy as np
import pytest
from method_cases import FORCED, ONE_LAYER, fitted, run

from kvjax.methods import METHODS
from pallas_kernels import dispatch
from pallas_kernels.backend import Target, aim
from pallas_kernels.registry import ops

pytestmark = pytest.mark.interpreted
FEW = FORCED[:, :3]
CASES = {name: fitted(method, ONE_LAYER) for name, method in method_cases.CASES.items()}


@functools.lru_cache(1)
def expected(name: str) -> np.ndarray:
    """The logits that the references give."""
    return run(ONE_LAYER, CASES[name], forced=FEW)[0]


# A TPU runs methods alone: what chains call is known by then, and its host holds pages, which tiny heads do
# not fill (unit/test_tiers.py has larger ones).
@pytest.mark.parametrize(
    ("name", "platform"), [(n, p) for n in CASES for p in ("gpu", "tpu") if p == "gpu" or n in METHODS]
)
def test_kernels_change_nothing(name, platform):
    logits = expected(name)
    with aim(Target(platform, "interpreted", "forward")), dispatch.watch() as taken:
        ours, _ = run(ONE_LAYER, CASES[name], forced=FEW)
    del taken["prefill_attention"]  # no library takes float32: its own test is elsewhere
    kernels = {name: platform if platform in ops()[name].platforms else "reference" for name in taken}
    assert taken == kernels
    assert platform in taken.values()
    np.testing.assert_allclose(ours, logits, atol=2e-4)
