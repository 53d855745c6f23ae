"""Turns GGUF metadata into a ModelConfig, with what the format leaves to the reader.

**Source**: llama.cpp, whose loader fixes per architecture what files do not say: Gemma's
pattern of local layers, the local rotary base, the query scale of the largest models.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from kvjax.models.config import ModelConfig, RopeConfig
from kvjax.models.families import MAX_LAYERS, nearest, required_number, window_pattern
from kvjax.models.gguf_file import GGUFFile

__all__ = ["GGUF_FAMILIES", "config_from_gguf", "rope_from_factors"]


@dataclass(frozen=True)
class GGUFFamily:
    """What an architecture means without saying so in its metadata.

    wide_query_layers: with this many layers the query scale is (M / H)^-0.5, not D^-0.5.
    """

    family: str
    act: str = "silu"
    qk_norm: bool = False
    gemma: bool = False
    global_every: int = 0
    wide_query_layers: int = 0


GGUF_FAMILIES = {
    "llama": GGUFFamily("llama"),
    "qwen2": GGUFFamily("qwen2"),
    "qwen3": GGUFFamily("qwen3", qk_norm=True),
    "gemma2": GGUFFamily("gemma2", "gelu_tanh", gemma=True, global_every=2, wide_query_layers=46),
    "gemma3": GGUFFamily(
        "gemma3", "gelu_tanh", qk_norm=True, gemma=True, global_every=6, wide_query_layers=62
    ),
}
_LOCAL_BASE = 10_000.0


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Returns the ModelConfig of a GGUF file.

    Raises:
        ValueError: a size is missing or impossible.
        NotImplementedError: an unknown architecture, or a feature that the decoder lacks.
    """
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in GGUF_FAMILIES:
        raise NotImplementedError(
            f"GGUF architectures read are {', '.join(GGUF_FAMILIES)}, got {arch!r}; the nearest is "
            f"{nearest(str(arch), GGUF_FAMILIES)!r}: convert to it or add a row to GGUF_FAMILIES"
        )
    row = GGUF_FAMILIES[arch]
    own = {k.removeprefix(arch + "."): v for k, v in file.metadata.items() if k.startswith(arch + ".")}
    n_layers = required_number(own, "block_count", most=MAX_LAYERS)
    width = required_number(own, "embedding_length")
    n_heads = _per_layer(file, own, arch, "attention.head_count")
    n_kv_heads = _per_layer(file, own, arch, "attention.head_count_kv", n_heads)
    head_dim = required_number({"attention.key_length": width // n_heads} | own, "attention.key_length")
    _refuse_unsupported(own, head_dim)
    windows, local_rope = _windows(file, own, row, n_layers)
    wide = n_layers == row.wide_query_layers
    return ModelConfig(
        family=row.family,
        vocab_size=_embedding_rows(file),
        width=width,
        ffn_width=_per_layer(file, own, arch, "feed_forward_length"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        context_length=required_number(own, "context_length"),
        rope=_rope(file, own, head_dim),
        norm_eps=required_number(own, "attention.layer_norm_rms_epsilon", float),
        query_scale=(width / n_heads if wide else head_dim) ** -0.5,
        layer_windows=windows,
        local_rope=local_rope,
        act=row.act,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm=row.qk_norm,
        post_norms=row.gemma,
        embed_scale=math.sqrt(width) if row.gemma else 1.0,
        attn_softcap=_softcap(own, "attn_logit_softcapping"),
        final_softcap=_softcap(own, "final_logit_softcapping"),
        tied_embeddings="output.weight" not in file.tensors,
    )


def _embedding_rows(file: GGUFFile) -> int:
    shape = file.shapes.get("token_embd.weight")
    if shape is None or len(shape) != 2:
        raise ValueError(
            f"a GGUF model holds 'token_embd.weight' with two dimensions, got {shape=} in "
            f"{str(file.path)!r}; "
            "give a language model"
        )
    return shape[0]


def _per_layer(file: GGUFFile, own: dict, arch: str, key: str, default: int | None = None) -> int:
    """Returns a size that a file may give once or for every layer alike."""
    value = own.get(key, default)
    if value is not None and not isinstance(value, (int, float, str)):
        values = set(file.list(f"{arch}.{key}"))
        if len(values) != 1:
            raise NotImplementedError(
                f"layers are of one size, got {key}={sorted(values)} in {str(file.path)!r}; choose another "
                "model"
            )
        value = values.pop()
    return required_number({key: value}, key)


def _refuse_unsupported(own: dict, head_dim: int) -> None:
    refused = {
        "expert_count": own.get("expert_count", 0) in (0, None),
        "rope.dimension_count": own.get("rope.dimension_count", head_dim) == head_dim,
        "attention.value_length": own.get("attention.value_length", head_dim) == head_dim,
        "attention.causal": own.get("attention.causal", True) is True,
        "attention.scale": own.get("attention.scale") is None,
    }
    for key, fine in refused.items():
        if not fine:
            raise NotImplementedError(
                f"the decoder has dense layers, heads rotated as a whole and of one size (D={head_dim}), "
                f"got {key}={own[key]!r}; choose another model"
            )


def _softcap(own: dict, key: str) -> float | None:
    return None if not own.get(key) else required_number(own, key, float)


def _windows(
    file: GGUFFile, own: dict, row: GGUFFamily, n_layers: int
) -> tuple[tuple[int | None, ...], RopeConfig | None]:
    """Returns each layer's window and the rotary settings of the layers that have one."""
    key = "attention.sliding_window"
    if not own.get(key):
        return (None,) * n_layers, None
    window = required_number(own, key)
    if not row.global_every:
        if window >= required_number(own, "context_length"):
            return (None,) * n_layers, None
        if row.family != "llama":
            raise NotImplementedError(
                f"{row.family} files do not say which layers have a window, got {key}={window}; "
                "load the Hugging Face folder"
            )
        return (window,) * n_layers, None
    windows = _pattern(file, own.get(f"{key}_pattern", row.global_every), n_layers, window)
    if not row.qk_norm:  # Gemma 2 rotates all layers alike
        return windows, None
    base = own.get("rope.freq_base_swa", _LOCAL_BASE)
    return windows, RopeConfig(required_number({"rope.freq_base_swa": base}, "rope.freq_base_swa", float))


def _pattern(file: GGUFFile, every, n_layers: int, window: int) -> tuple[int | None, ...]:
    """Returns the windows from a period, or from a list that has a flag for each local layer."""
    key = "attention.sliding_window_pattern"
    if isinstance(every, (int, float, str)):
        return window_pattern(n_layers, window, required_number({key: every}, key))
    flags = file.list(f"{file.metadata['general.architecture']}.{key}")
    if len(flags) != n_layers:
        raise ValueError(
            f"{key} has one flag per layer, got {len(flags)} for {n_layers=} in {str(file.path)!r}; "
            "convert the model again"
        )
    return tuple(window if flag else None for flag in flags)


def _rope(file: GGUFFile, own: dict, head_dim: int) -> RopeConfig:
    """Returns the global rotary settings; Llama 3's scaling is a tensor, not metadata."""
    base = required_number({"rope.freq_base": 10_000.0} | own, "rope.freq_base", float)
    if "rope_freqs.weight" in file.tensors:
        shape = file.shapes["rope_freqs.weight"]
        if shape != (head_dim // 2,):
            raise ValueError(
                f"rope_freqs.weight has one factor for each pair of a head, got {shape=} for {head_dim=}; "
                "convert the model again"
            )
        return rope_from_factors(file.rows("rope_freqs.weight", 0, 1)[0], base)
    scheme = own.get("rope.scaling.type", "linear" if own.get("rope.scale_linear") else "none")
    if scheme == "none":
        return RopeConfig(base)
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear"))
    factor = required_number({"rope.scaling.factor": factor}, "rope.scaling.factor", float)
    if scheme == "linear":
        return RopeConfig(base, "linear", factor) if factor != 1 else RopeConfig(base)
    if scheme != "yarn":
        raise NotImplementedError(
            f"rotary scalings read from GGUF are none, linear and yarn, got {scheme!r}; choose another model"
        )
    original = required_number(own, "rope.scaling.original_context_length")
    yarn = RopeConfig(base, "yarn", factor, original)
    betas = {f"beta_{k}": own.get(f"rope.scaling.yarn_beta_{k}") for k in ("fast", "slow")}
    return replace(yarn, **{k: required_number({k: v}, k, float) for k, v in betas.items() if v is not None})


def rope_from_factors(factors: np.ndarray, base: float) -> RopeConfig:
    """Returns the llama3 scaling whose frequencies are divided by these factors, [D / 2].

    Only original_context / (high - low) and low / (high - low) can be seen in them, so low is
    taken as 1, which it is in every published model.

    Raises:
        NotImplementedError: no llama3 scaling gives these factors.
    """
    factors = np.asarray(factors, np.float64)
    turns = base ** (-np.arange(len(factors)) / len(factors)) / (2 * np.pi)  # per token
    scale = float(np.max(factors)) if np.all(np.isfinite(factors)) and np.all(factors > 0) else 0.0
    if scale > 1 and np.min(factors) >= 0.999:
        smooth = (1 / factors - 1 / scale) / (1 - 1 / scale)
        between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
        for low, high, original in _llama3_guesses(turns[between], smooth[between]):
            expected = np.clip((original * turns - low) / (high - low), 0, 1)
            if np.allclose(1 / ((1 - expected) / scale + expected), factors, rtol=2e-3):
                return RopeConfig(base, "llama3", scale, original, low, high)
    raise NotImplementedError(
        f"rope_freqs.weight is read where it is Llama 3's frequency scaling, got {factors[:3]=} to {scale=}; "
        "load the Hugging Face folder"
    )


def _llama3_guesses(turns: np.ndarray, smooth: np.ndarray) -> list[tuple[float, float, int]]:
    """Returns (low, high, original context) to try: the published ones, then a fitted line."""
    guesses = [(1.0, 4.0, 8192)]
    if len(turns) > 1:
        slope, offset = np.polyfit(turns, smooth, 1)
        if offset < 0 < slope:
            high = 1 - 1 / offset
            guesses.append((1.0, round(high, 2), round(slope * (high - 1))))
    return guesses
