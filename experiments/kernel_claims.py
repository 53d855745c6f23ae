"""The figures of the kernels that README and docs quote: which rows each is about, and how it is read off."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["CLAIMS", "claims"]

_MIB = 2**20
_FIGURES = {
    "fraction": lambda row: row["fraction"],
    "speedup": lambda row: row["speedup"],
    "time_ratio": lambda row: 1 / row["speedup"],
    "over_floor": lambda row: 1 / row["fraction"],
}
_SPARSE = "sparse_decode_attention"
CLAIMS = (  # name, op, pattern of the cases, pattern of the peer, figure
    ("decode_attention.copy_fraction_min", "decode_attention", r"\d-bfloat16$", "cudnn", "fraction"),
    ("decode_attention.copy_fraction_64mb_min", "decode_attention", r"\d-bfloat16$", "cudnn", "fraction"),
    ("decode_attention.vs_cudnn_min", "decode_attention", "", "cudnn", "speedup"),
    ("decode_attention.vs_jax_op_min", "decode_attention", "", "jax_op", "speedup"),
    ("decode_attention.ragged_time_ratio", "decode_attention", "", "uniform heads", "time_ratio"),
    ("decode_attention.int8_time_ratio", "decode_attention", "-int8-", "bfloat16", "time_ratio"),
    ("decode_attention.int4_time_ratio", "decode_attention", "-int4-", "bfloat16", "time_ratio"),
    (_SPARSE + ".block_fraction", _SPARSE, r"^b8.*-p16x\d+-bfloat16$", "", "fraction"),
    (_SPARSE + ".token_fraction", _SPARSE, r"^b8.*-p1x\d+-bfloat16$", "", "fraction"),
    (_SPARSE + ".host_block_fraction", _SPARSE, "-p16x.*-host$", "", "fraction"),
    (_SPARSE + ".host_token_fraction", _SPARSE, "-p1x.*-host$", "", "fraction"),
    ("chunked_similarity.vs_read_k", "chunked_similarity", "^b8.*-c(64|256)-", "", "over_floor"),
    ("vq_scores.vs_exact", "vq_scores", "-s131072-.*-to-float32$", "exact", "speedup"),
    ("select_topk.vs_lax", "select_topk", "^64-s131072-top2048-normal", "lax", "speedup"),
    ("sparse_matvec.speedup_50", "spvmm|vmmsp", "^b1-.*-z50-bfloat16$", "dense", "speedup"),
    ("sparse_matvec.speedup_70", "spvmm|vmmsp", "^b1-.*-z70-bfloat16$", "dense", "speedup"),
    ("sparse_matvec.time_ratio_0", "spvmm|vmmsp", "^b1-.*-z0-bfloat16$", "dense", "time_ratio"),
)
_SIZES = {  # bytes that a claim is about: more than, up to
    "decode_attention.copy_fraction_min": (256 * _MIB, math.inf),
    "decode_attention.copy_fraction_64mb_min": (64 * _MIB, 256 * _MIB),
}


def claims(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the figures that README and docs quote: the worst of the rows that each is about."""
    found = {}
    for claim, op, spec, peer, figure in CLAIMS:
        about = [
            r
            for r in rows
            if re.fullmatch(op, r["name"]) and re.search(spec, r["spec"]) and re.search(peer, r["peer"])
        ]
        if claim in _SIZES:
            about = [r for r in about if _SIZES[claim][0] < r["bytes"] <= _SIZES[claim][1]]
        values = [_FIGURES[figure](row) for row in about]
        if values:
            found[claim] = max(values) if figure in ("time_ratio", "over_floor") else min(values)
    return found
