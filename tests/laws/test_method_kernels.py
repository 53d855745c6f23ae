"""Every method gives with kernels, interpreted, what it gives with the references."""

import dataclasses

import method_cases
import numpy as np
import pytest
from method_cases import FORCED, codebooks, run, tiny

from pallas_kernels import dispatch
from pallas_kernels.backend import Target, aim
from pallas_kernels.registry import ops

pytestmark = pytest.mark.interpreted
FEW = FORCED[:, :3]
MODEL = tiny(2, windows=(None,))  # layers are alike, and each is compiled
CASES = {
    name: dataclasses.replace(m, calibration=codebooks(MODEL)) if hasattr(m, "calibration") else m
    for name, m in method_cases.CASES.items()
}


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_change_nothing(name, platform):
    if platform == "tpu" and CASES[name].tier == "host":
        pytest.skip(
            "a TPU's host holds pages, which tiny heads do not fill: unit/test_tiers.py has larger ones"
        )
    expected, _ = run(MODEL, CASES[name], forced=FEW)
    with aim(Target(platform, "interpreted", "forward")), dispatch.watch() as taken:
        ours, _ = run(MODEL, CASES[name], forced=FEW)
    del taken["prefill_attention"]  # no library takes float32: its own test is elsewhere
    kernels = {name: platform if platform in ops()[name].platforms else "reference" for name in taken}
    assert taken == kernels
    assert platform in taken.values()
    np.testing.assert_allclose(ours, expected, atol=2e-4)
