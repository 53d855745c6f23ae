"""Turns a Hugging Face `config.json` into a ModelConfig; a family is a row of data.

Defaults are those of transformers' configuration classes, because published files leave out
what equals them. Whatever the decoder cannot do is refused by name, never dropped.
"""

import difflib
import math
from dataclasses import dataclass, field

from kvjax.models.config import ModelConfig, RopeConfig

__all__ = ["FAMILIES", "Family", "config_from_hf", "nearest", "required_number", "window_pattern"]

MAX_LAYERS = 4096


@dataclass(frozen=True)
class Family:
    """What one architecture fixes, apart from the sizes that its files give.

    defaults: values of keys that config.json may leave out.
    global_every: every n-th layer sees all tokens, the others a window (0: no such pattern).
    """

    defaults: dict = field(default_factory=dict)
    act: str = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False
    global_every: int = 0


_GEMMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "tie_word_embeddings": True,
}
FAMILIES = {
    "llama": Family(),
    "mistral": Family({"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}),
    "qwen2": Family({"num_key_value_heads": 32, "max_position_embeddings": 32768}, qkv_bias=True),
    "qwen3": Family(
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128}, qk_norm=True
    ),
    "gemma2": Family(
        _GEMMA
        | {
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        act="gelu_tanh",
        gemma=True,
        global_every=2,
    ),
    "gemma3_text": Family(
        _GEMMA | {"vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1_000_000.0},
        act="gelu_tanh",
        gemma=True,
        qk_norm=True,
        global_every=6,
    ),
}
_ACTS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# Keys of features that the decoder lacks, with the values that mean "not used".
_REFUSED = {
    "mlp_bias": (False,),
    "quantization_config": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "clip_qkv": (),
    "no_rope_layers": (),
    "use_qk_norm": (False,),
    "attn_temperature_tuning": (False, 0),
    "use_parallel_residual": (False,),
    "attention_multiplier": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "is_encoder_decoder": (False,),
    "kv_lora_rank": (),
}


def nearest(name: str, known) -> str:
    """Returns the known name most like `name`."""
    known = sorted(known)
    return (difflib.get_close_matches(str(name), known, n=1, cutoff=0.0) or known)[0]


def required_number(settings: dict, key: str, kind: type = int, most: int = 2**31):
    """Returns settings[key] as a positive number of that kind.

    Raises:
        ValueError: missing, not a number, not positive, or more than `most`.
    """
    value = settings.get(key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= most or kind(value) != value:
        raise ValueError(
            f"the model's configuration must hold a positive {kind.__name__} up to {most} for {key!r}, "
            f"got {value=}; download the configuration again"
        )
    return kind(value)


def window_pattern(n_layers: int, window: int, global_every: int) -> tuple[int | None, ...]:
    """Returns the windows of layers of which every `global_every`-th sees all tokens."""
    return tuple(None if (i + 1) % global_every == 0 else window for i in range(n_layers))


def config_from_hf(raw: dict) -> ModelConfig:
    """Returns the ModelConfig of a parsed config.json.

    Raises:
        ValueError: a size is missing or impossible.
        NotImplementedError: an unknown architecture, or a feature that the decoder lacks.
    """
    name, settings = _family_of(raw)
    family = FAMILIES[name]
    settings = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False} | family.defaults | settings
    _refuse_unsupported(settings)
    n_layers = required_number(settings, "num_hidden_layers", most=MAX_LAYERS)
    width, n_heads = (
        required_number(settings, "hidden_size"),
        required_number(settings, "num_attention_heads"),
    )
    if settings.get("head_dim") is None:
        settings["head_dim"] = width // n_heads
    if settings.get("num_key_value_heads") is None:
        settings["num_key_value_heads"] = n_heads
    settings.setdefault("max_position_embeddings", 2048)
    head_dim = required_number(settings, "head_dim")
    rope, local_rope = _ropes(settings, family)
    context = required_number(settings, "max_position_embeddings")
    if rope.scaling == "yarn":
        context = max(context, int(rope.original_context * rope.factor))
    scale_of = required_number(settings, "query_pre_attn_scalar", float) if family.gemma else head_dim
    attention_bias = bool(settings.get("attention_bias"))
    return ModelConfig(
        family="gemma3" if name == "gemma3_text" else name,
        vocab_size=required_number(settings, "vocab_size"),
        width=width,
        ffn_width=required_number(settings, "intermediate_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=required_number(settings, "num_key_value_heads"),
        head_dim=head_dim,
        context_length=context,
        rope=rope,
        norm_eps=required_number(settings, "rms_norm_eps", float),
        query_scale=scale_of**-0.5,
        layer_windows=_windows(settings, name, n_layers),
        local_rope=local_rope,
        act=_act(settings, family),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias and name != "qwen2",
        qk_norm=family.qk_norm,
        post_norms=family.gemma,
        embed_scale=math.sqrt(width) if family.gemma else 1.0,
        attn_softcap=_softcap(settings, "attn_logit_softcapping"),
        final_softcap=_softcap(settings, "final_logit_softcapping"),
        tied_embeddings=bool(settings["tie_word_embeddings"]),
    )


def _family_of(raw: dict) -> tuple[str, dict]:
    """Returns the family's name and its settings (of the text part, if there are several)."""
    if not isinstance(raw.get("model_type"), str):
        raise ValueError(
            f"config.json names its 'model_type', got {raw.get('model_type')!r}; download it again"
        )
    name = raw["model_type"]
    if name == "gemma3":
        text = raw.get("text_config")
        if not isinstance(text, dict):
            raise ValueError(f"a gemma3 config.json holds its 'text_config', got {text=}; download it again")
        return "gemma3_text", {k: raw[k] for k in ("tie_word_embeddings",) if k in raw} | text
    if name not in FAMILIES:
        raise NotImplementedError(
            f"architectures read are {', '.join(FAMILIES)}, got {name!r}; the nearest is "
            f"{nearest(name, FAMILIES)!r}: convert to it or add a row to FAMILIES"
        )
    return name, dict(raw)


def _refuse_unsupported(settings: dict) -> None:
    for key, neutral in _REFUSED.items():
        value = settings.get(key)
        if value is not None and value not in neutral:
            raise NotImplementedError(
                f"the decoder has no {key!r}, got {value!r} in config.json; choose a model without it"
            )
    partial = settings.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise NotImplementedError(
            f"rotary embedding covers the whole head, got partial_rotary_factor={partial!r}; "
            "choose a model without it"
        )


def _act(settings: dict, family: Family) -> str:
    """Returns the activation; Gemma's first files say "gelu" in hidden_act and mean gelu_tanh."""
    name = settings.get("hidden_activation" if family.gemma else "hidden_act")
    if name is None:
        return family.act
    if name not in _ACTS:
        raise NotImplementedError(
            f"activations are {', '.join(_ACTS)}, got {name!r} in config.json; choose a model with one of "
            "them"
        )
    return _ACTS[name]


def _softcap(settings: dict, key: str) -> float | None:
    return None if settings.get(key) is None else required_number(settings, key, float)


def _windows(settings: dict, name: str, n_layers: int) -> tuple[int | None, ...]:
    """Returns each layer's window, from layer_types where given."""
    window = settings.get("sliding_window")
    if (
        name == "llama"
        or window is None
        or (name.startswith("qwen") and not settings.get("use_sliding_window"))
    ):
        return (None,) * n_layers
    window = required_number(settings, "sliding_window")
    types = settings.get("layer_types")
    if types is not None:
        known = {"full_attention": None, "sliding_attention": window}
        if not isinstance(types, list) or len(types) != n_layers or not all(str(t) in known for t in types):
            raise ValueError(
                f"layer_types holds {' or '.join(known)} for each layer, got {types=} for {n_layers=}; "
                "download config.json again"
            )
        return tuple(known[str(t)] for t in types)
    if name.startswith("qwen"):
        first = settings.get("max_window_layers", 28)
        if type(first) is not int:
            raise ValueError(
                f"max_window_layers is a number of layers, got {first=}; download config.json again"
            )
        return tuple(window if i >= first else None for i in range(n_layers))
    if FAMILIES[name].global_every:
        key = "sliding_window_pattern" if "sliding_window_pattern" in settings else "_sliding_window_pattern"
        every = required_number({key: FAMILIES[name].global_every} | settings, key)
        return window_pattern(n_layers, window, every)
    return (window,) * n_layers


def _ropes(settings: dict, family: Family) -> tuple[RopeConfig, RopeConfig | None]:
    """Returns the global and the local rotary settings, from either generation of names."""
    given, scaling = _object(settings.get("rope_parameters")), _object(settings.get("rope_scaling"))
    if given and "full_attention" in given:
        full, local = _object(given["full_attention"]), _object(given.get("sliding_attention"))
        return _rope(full, settings, 10_000.0), _rope(local or full, settings, 10_000.0)
    rope = _rope(given or scaling, settings, settings.get("rope_theta") or 10_000.0)
    if not family.gemma or not family.qk_norm:
        return rope, None
    return rope, _rope({}, settings, settings.get("rope_local_base_freq") or 10_000.0)


def _object(value) -> dict:
    """Returns rotary settings, empty where there are none."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"rotary settings are an object, got {value=}; download config.json again")
    return value or {}


def _rope(given: dict, settings: dict, base: float) -> RopeConfig:
    """Returns one RopeConfig; `given` is transformers' rope_scaling or rope_parameters."""
    values = {"rope_theta": base} | {k: v for k, v in given.items() if v is not None}
    scheme = values.get("rope_type", values.get("type", "default"))
    if values.get("partial_rotary_factor", 1) != 1 or values.get("truncate", True) is not True:
        raise NotImplementedError(
            f"partial rotary heads and untruncated YaRN are not read, got {given=}; choose a model without "
            "them"
        )
    base = required_number(values, "rope_theta", float)
    if scheme == "default":
        return RopeConfig(base)
    if scheme not in ("linear", "llama3", "yarn"):
        raise NotImplementedError(
            f"rotary scalings are default, linear, llama3 and yarn, got {scheme!r}; choose a model with one "
            "of them"
        )
    factor = required_number(values, "factor", float)
    if scheme == "linear":
        return RopeConfig(base, "linear", factor)
    fallback = {"original_max_position_embeddings": settings.get("max_position_embeddings")}
    original = required_number(fallback | values, "original_max_position_embeddings")
    if scheme == "llama3":
        low, high = (required_number(values, k, float) for k in ("low_freq_factor", "high_freq_factor"))
        return RopeConfig(base, "llama3", factor, original, low, high)
    betas = {"beta_fast": 32.0, "beta_slow": 1.0} | values
    fast, slow = (required_number(betas, key, float) for key in ("beta_fast", "beta_slow"))
    return RopeConfig(
        base,
        "yarn",
        factor,
        original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=_yarn_attention(values),
    )


def _yarn_attention(values: dict) -> float | None:
    """Returns the factor on cos and sin if the file sets it, by itself or through mscale."""
    if "attention_factor" in values:
        return required_number(values, "attention_factor", float)
    if not values.get("mscale") or not values.get("mscale_all_dim"):
        return None
    log = math.log(max(values["factor"], 1.0))
    over, under = (0.1 * required_number(values, k, float) * log + 1.0 for k in ("mscale", "mscale_all_dim"))
    return over / under
