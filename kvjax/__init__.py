"""kvjax: long-context LLM inference in JAX when memory is the wall."""

from kvjax.contexts import close_context, load_context, recover_context, save_context
from kvjax.debug import debug
from kvjax.decoding import decode, decode_step
from kvjax.generate import Completion, generate, stream
from kvjax.method import CacheMethod, chain
from kvjax.methods import METHODS
from kvjax.model import Model, load
from kvjax.reading import pad, prefill
from kvjax.sampling import Sampling
from kvjax.sparsity import SPARSITIES

__all__ = [
    "METHODS",
    "SPARSITIES",
    "CacheMethod",
    "Completion",
    "Model",
    "Sampling",
    "chain",
    "close_context",
    "debug",
    "decode",
    "decode_step",
    "generate",
    "load",
    "load_context",
    "pad",
    "prefill",
    "recover_context",
    "save_context",
    "stream",
]
