"""Kernels for attention over compressed caches, for GPU and TPU, each with a plain reference."""

from pallas_kernels.add_norm import add_norm
from pallas_kernels.append_rows import Turn, append_rows
from pallas_kernels.assign_lines import assign_lines
from pallas_kernels.attention import AttentionForm, Codes, join
from pallas_kernels.block_bounds import block_bounds
from pallas_kernels.bound_scores import bound_scores
from pallas_kernels.chunked_similarity import chunked_similarity
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.fetch_rows import fetch_rows
from pallas_kernels.gate_up import gate_up
from pallas_kernels.mark_topk import mark_topk
from pallas_kernels.merge_rows import MergeForm, merge_rows
from pallas_kernels.rotate_rows import rotate_rows
from pallas_kernels.select_topk import select_topk
from pallas_kernels.sparse_decode_attention import sparse_decode_attention
from pallas_kernels.spvmm import spvmm
from pallas_kernels.spvmm_each import spvmm_each
from pallas_kernels.stow_rows import stow_rows
from pallas_kernels.union_topk import union_topk
from pallas_kernels.vmmsp import vmmsp
from pallas_kernels.vq_assign import vq_assign
from pallas_kernels.vq_scores import vq_scores
from pallas_kernels.vq_topk import vq_topk
from pallas_kernels.write_codes import Ring, write_codes

__all__ = [
    "AttentionForm",
    "Codes",
    "MergeForm",
    "Ring",
    "Turn",
    "add_norm",
    "append_rows",
    "assign_lines",
    "block_bounds",
    "bound_scores",
    "chunked_similarity",
    "decode_attention",
    "fetch_rows",
    "gate_up",
    "join",
    "mark_topk",
    "merge_rows",
    "rotate_rows",
    "select_topk",
    "sparse_decode_attention",
    "spvmm",
    "spvmm_each",
    "stow_rows",
    "union_topk",
    "vmmsp",
    "vq_assign",
    "vq_scores",
    "vq_topk",
    "write_codes",
]
