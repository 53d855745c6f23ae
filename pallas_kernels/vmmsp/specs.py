"""The cases of vmmsp that are tested, timed and tuned."""

from pallas_kernels.op import Op
from pallas_kernels.sparse_cases import CASES, MatvecSpec
from pallas_kernels.vmmsp import gpu, vmmsp

__all__ = ["OP"]

SPECS = tuple(MatvecSpec(*case, gated=True) for case in CASES)


def _candidates(spec: MatvecSpec) -> list[gpu.Settings]:
    return [
        gpu.Settings(rows, loads, warps)
        for rows in ((2, 4, 8, 16, 32) if spec.batch == 1 else (16, 32, 64))
        for loads in (2, 4, 8, 16)
        for warps in (2, 4, 8, 16)
    ]


OP = Op(vmmsp, SPECS, candidates=_candidates)
