"""Describes a decoder by its sizes and switches, so that families differ by data alone."""

from dataclasses import dataclass

import numpy as np

__all__ = ["ModelConfig", "RopeConfig"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer.

    scaling: "none" | "linear" (positions / factor) | "llama3" | "yarn". The remaining
    fields are those of the scheme and carry the names that Hugging Face gives them.
    """

    base: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer; every field is static and the whole is hashable.

    layer_windows: per layer, tokens a query sees including itself, or None for all.
    local_rope: rotary settings of the layers with a window (None: the same as `rope`).
    query_scale: factor on q·k. act: "silu" | "gelu_tanh".
    """

    family: str
    vocab_size: int  # V
    width: int  # M
    ffn_width: int  # F
    n_layers: int  # L
    n_heads: int  # H
    n_kv_heads: int  # K
    head_dim: int  # D
    context_length: int
    rope: RopeConfig
    norm_eps: float
    query_scale: float
    layer_windows: tuple[int | None, ...]
    local_rope: RopeConfig | None = None
    act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    attn_softcap: float | None = None
    final_softcap: float | None = None
    tied_embeddings: bool = True

    def __post_init__(self):
        """Raises ValueError where the sizes contradict each other."""
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"query heads come in equal groups per KV head, got {self.n_heads=} and {self.n_kv_heads=}"
            )
        if len(self.layer_windows) != self.n_layers:
            raise ValueError(
                f"layer_windows has one entry per layer, got {len(self.layer_windows)} for {self.n_layers=}"
            )
        if self.head_dim % 2:
            raise ValueError(f"rotary heads have an even size, got {self.head_dim=}")

    @property
    def group(self) -> int:
        """Query heads per KV head, G."""
        return self.n_heads // self.n_kv_heads

    def rope_of(self, layer: int) -> RopeConfig:
        """Rotary settings of one layer."""
        local = self.layer_windows[layer] is not None and self.local_rope is not None
        return self.local_rope if local else self.rope

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by its path, the contract between loaders and decoder."""
        m, f, d = self.width, self.ffn_width, self.head_dim
        q, kv = self.n_heads * d, self.n_kv_heads * d
        shapes = {"embed/embedding": (self.vocab_size, m), "final_norm/scale": (m,)}
        if not self.tied_embeddings:
            shapes["head/kernel"] = (m, self.vocab_size)
        layer = {"attn_norm/scale": (m,), "ffn_norm/scale": (m,)}
        for name, shape in {"q": (m, q), "k": (m, kv), "v": (m, kv), "o": (q, m)}.items():
            layer[f"attn/{name}/kernel"] = shape
            if self.o_bias if name == "o" else self.qkv_bias:
                layer[f"attn/{name}/bias"] = shape[1:]
        for name, shape in {"gate": (m, f), "up": (m, f), "down": (f, m)}.items():
            layer[f"ffn/{name}/kernel"] = shape
        if self.qk_norm:
            layer |= {"attn/q_norm/scale": (d,), "attn/k_norm/scale": (d,)}
        if self.post_norms:
            layer |= {"post_attn_norm/scale": (m,), "post_ffn_norm/scale": (m,)}
        return shapes | {f"layer_{i}/{k}": v for i in range(self.n_layers) for k, v in layer.items()}

    def n_params(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(shape)) for shape in self.param_shapes().values())
