"""Says under which name, and in which form, a checkpoint holds each parameter."""

from dataclasses import dataclass

from kvjax.models.config import ModelConfig

__all__ = ["Origin", "gguf_origins", "hf_origins", "hf_prefix"]


@dataclass(frozen=True)
class Origin:
    """One parameter's tensor in a file.

    transposed: the file holds [out, in]. paired_heads: rows are permuted for pairwise RoPE
    in this many heads. shift: added to every value (Hugging Face stores Gemma's scale less 1).
    """

    tensor: str
    transposed: bool = False
    paired_heads: int = 0
    shift: float = 0.0


_HF_LINEAR = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "ffn/gate": "mlp.gate_proj",
    "ffn/up": "mlp.up_proj",
    "ffn/down": "mlp.down_proj",
}
_HF_NORM = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
}
# With norms on both sides the same word names another place.
_HF_POST_NORM = _HF_NORM | {
    "post_attn_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffn_norm": "post_feedforward_layernorm",
}
_GGUF_LAYER = {
    "attn/q": "attn_q",
    "attn/k": "attn_k",
    "attn/v": "attn_v",
    "attn/o": "attn_output",
    "ffn/gate": "ffn_gate",
    "ffn/up": "ffn_up",
    "ffn/down": "ffn_down",
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attn/q_norm": "attn_q_norm",
    "attn/k_norm": "attn_k_norm",
    "post_attn_norm": "post_attention_norm",
    "post_ffn_norm": "post_ffw_norm",
}
_PREFIXES = ("model.", "", "language_model.model.", "model.language_model.")


def hf_prefix(names) -> str:
    """Returns what stands before `embed_tokens` in a folder's tensor names.

    Raises:
        ValueError: the folder holds no token embedding.
    """
    for prefix in _PREFIXES:
        if f"{prefix}embed_tokens.weight" in names:
            return prefix
    raise ValueError(
        f"a decoder's folder holds 'model.embed_tokens.weight', got {sorted(names)[:3]} ...; "
        "give the folder of a causal language model"
    )


def hf_origins(config: ModelConfig, prefix: str) -> dict[str, Origin]:
    """Returns the Origin of every parameter in a Hugging Face folder."""
    norms = _HF_POST_NORM if config.post_norms else _HF_NORM
    shift = 1.0 if config.family.startswith("gemma") else 0.0
    origins = {}
    for path in config.param_shapes():
        place, kind = path.rsplit("/", 1)
        if path == "embed/embedding":
            origin = Origin(f"{prefix}embed_tokens.weight")
        elif path == "head/kernel":
            outer = prefix.removesuffix("model.") if prefix == "language_model.model." else ""
            origin = Origin(f"{outer}lm_head.weight", transposed=True)
        elif path == "final_norm/scale":
            origin = Origin(f"{prefix}norm.weight", shift=shift)
        else:
            layer, place = place.removeprefix("layer_").split("/", 1)
            stem = f"{prefix}layers.{layer}."
            if kind == "scale":
                origin = Origin(f"{stem}{norms[place]}.weight", shift=shift)
            else:
                word = "weight" if kind == "kernel" else "bias"
                origin = Origin(f"{stem}{_HF_LINEAR[place]}.{word}", transposed=kind == "kernel")
        origins[path] = origin
    return origins


def gguf_origins(config: ModelConfig, arch: str) -> dict[str, Origin]:
    """Returns the Origin of every parameter in a GGUF file of that architecture."""
    paired = {"attn/q": config.n_heads, "attn/k": config.n_kv_heads} if arch == "llama" else {}
    origins = {
        "embed/embedding": Origin("token_embd.weight"),
        "final_norm/scale": Origin("output_norm.weight"),
        "head/kernel": Origin("output.weight", transposed=True),
    }
    for path in config.param_shapes():
        if path in origins:
            continue
        layer, place = path.rsplit("/", 1)[0].removeprefix("layer_").split("/", 1)
        kind = path.rsplit("/", 1)[1]
        word = "bias" if kind == "bias" else "weight"
        name = f"blk.{layer}.{_GGUF_LAYER[place]}.{word}"
        origins[path] = Origin(name, transposed=kind == "kernel", paired_heads=paired.get(place, 0))
    return {path: origins[path] for path in config.param_shapes()}
