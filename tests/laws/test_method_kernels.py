"""Every method gives with kernels, interpreted, what it gives with the references."""

import numpy as np
import pytest
from method_cases import CASES, FORCED, MODELS, run

from pallas_kernels import dispatch
from pallas_kernels.backend import Target, aim

pytestmark = pytest.mark.interpreted
FEW = FORCED[:, :3]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_change_nothing(name, platform):
    if platform == "tpu" and CASES[name].tier == "host":
        pytest.skip(
            "a TPU's host holds pages, which tiny heads do not fill: unit/test_tiers.py has larger ones"
        )
    model = MODELS["G2"]
    expected, _ = run(model, CASES[name], forced=FEW)
    with aim(Target(platform, "interpreted", "forward")), dispatch.watch() as taken:
        ours, _ = run(model, CASES[name], forced=FEW)
    del taken["prefill_attention"]  # no library takes float32: its own test is elsewhere
    assert set(taken.values()) == {platform}
    np.testing.assert_allclose(ours, expected, atol=2e-4)
