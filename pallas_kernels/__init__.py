"""Kernels for attention over compressed caches, for GPU and TPU, each with a plain reference."""

from pallas_kernels.attention import AttentionForm, Codes, join
from pallas_kernels.decode_attention import decode_attention

__all__ = ["AttentionForm", "Codes", "decode_attention", "join"]
