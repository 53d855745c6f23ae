"""The cases of vmmsp that are tested, timed and tuned."""

from pallas_kernels.op import Op
from pallas_kernels.sparse_matvec import CASES, MatvecSpec
from pallas_kernels.vmmsp import gpu, vmmsp

__all__ = ["OP"]

SPECS = tuple(MatvecSpec(*case, gated=True) for case in CASES)


def _candidates(spec: MatvecSpec) -> list[gpu.Settings]:
    return [
        gpu.Settings(rows, tile, warps)
        for rows in (4, 8, 16, 32, 64)
        for tile in (4096, 8192, 16384, 32768)
        for warps in (2, 4, 8)
        if spec.batch == 1 or rows >= 16
    ]


OP = Op(vmmsp, SPECS, candidates=_candidates)
