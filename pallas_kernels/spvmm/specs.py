"""The cases of spvmm that are tested, timed and tuned."""

from pallas_kernels.op import Op
from pallas_kernels.sparse_cases import CASES, MatvecSpec
from pallas_kernels.spvmm import gpu, spvmm

__all__ = ["OP"]

SPECS = (
    *(MatvecSpec(*case) for case in CASES),
    MatvecSpec(1, 2100, 1160, 0.7, "bfloat16", cut=True),
    MatvecSpec(3, 300, 200, 0.5, "float32", cut=True),
)


def _candidates(spec: MatvecSpec) -> list[gpu.Settings]:
    return [
        gpu.Settings(columns, loads, programs, warps)
        for columns in (32, 64, 128, 256, 512, 1024)
        for loads in (2, 4, 8, 16)
        for programs in (132, 264, 528, 1056, 2112)
        for warps in (4, 8, 16, 32)
    ]


OP = Op(spvmm, SPECS, candidates=_candidates)
