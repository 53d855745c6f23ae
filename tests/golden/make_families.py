"""Makes tiny random models of every family and their logits (run in the `peer` extra, it needs torch).

usage: python tests/golden/make_families.py [NAME ...]

Each folder is what a user would download: config.json and safetensors as Hugging Face writes
them, float32. `logits.npz` holds ids [B T] and the logits [B T V] of transformers with eager
attention. Most config.json files are rewritten to the older names that published checkpoints
carry (`rope_theta`, `rope_scaling`, no `layer_types`); the logits come from the model read
back from the files, so they say that transformers understands the same.

For each feature of a family the script prints how far the logits move without it, because a
golden that does not feel a feature does not test it.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

DATA = Path(__file__).parent / "data" / "families"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-3,
}


@dataclass(frozen=True)
class Family:
    """One golden folder: its model, and what to turn off to see that it matters.

    off: feature -> settings that replace the config's, or a function that edits the model.
    hub_names: write config.json with the names of published checkpoints.
    hub_extra: keys that published checkpoints carry and that transformers drops on saving.
    """

    model_type: str
    settings: dict
    off: dict[str, dict | Callable] = field(default_factory=dict)
    n_tokens: int = 40
    hub_names: bool = True
    hub_extra: dict = field(default_factory=dict)
    max_shard_size: str = "1GB"


def drop_modules(*names: str) -> Callable:
    """Returns an edit that replaces the named submodules of every layer by the identity."""

    def edit(model):
        for module in list(model.modules()):
            for name in names:
                if hasattr(module, name):
                    setattr(module, name, torch.nn.Identity())

    return edit


def zero_biases(model):
    """Sets every bias of the model to zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.zero_()


FAMILIES = {
    "llama": Family(
        "llama",
        {"num_key_value_heads": 4, "tie_word_embeddings": False, "rms_norm_eps": 1e-3},
        {"eps": {"rms_norm_eps": 1e-6}},
        max_shard_size="48KB",
    ),
    "llama3": Family(
        "llama",
        {
            "num_attention_heads": 8,
            "head_dim": 8,
            "rope_parameters": LLAMA3,
            "tie_word_embeddings": True,
        },
        {"scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}},
        n_tokens=80,
    ),
    "llama_linear": Family(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 500.0,
                "factor": 4.0,
            },
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        {
            "scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "bias": zero_biases,
        },
    ),
    "llama_yarn": Family(
        "llama",
        {"rope_parameters": YARN, "head_dim": 16, "tie_word_embeddings": True},
        {
            "scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "attention factor": {"rope_parameters": YARN | {"attention_factor": 1.0}},
            "beta_fast": {"rope_parameters": YARN | {"beta_fast": 32.0}},
            "beta_slow": {"rope_parameters": YARN | {"beta_slow": 1.0}},
        },
        n_tokens=80,
        hub_names=False,
    ),
    "mistral": Family(
        "mistral",
        {"sliding_window": 12, "tie_word_embeddings": False},
        {"window": {"sliding_window": None}, "window by one": {"sliding_window": 13}},
    ),
    "qwen2": Family(
        "qwen2",
        {"tie_word_embeddings": True},
        {"bias": zero_biases},
        hub_extra={
            "sliding_window": 12,
            "use_sliding_window": False,
            "max_window_layers": 1,
        },
    ),
    "qwen2_window": Family(
        "qwen2",
        {
            "sliding_window": 12,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "tie_word_embeddings": False,
        },
        {
            "window": {"use_sliding_window": False},
            "full layer 0": {"max_window_layers": 0},
        },
    ),
    "qwen3": Family(
        "qwen3",
        {"head_dim": 16, "tie_word_embeddings": True},
        {"qk-norm": drop_modules("q_norm", "k_norm")},
        hub_names=False,
    ),
    "gemma2": Family(
        "gemma2",
        GEMMA
        | {
            "sliding_window": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        {
            "attention soft-cap": {"attn_logit_softcapping": None},
            "final soft-cap": {"final_logit_softcapping": None},
            "window": {"sliding_window": 4096},
            "query scale": {"query_pre_attn_scalar": 16},
            "activation": {"hidden_activation": "silu"},
        },
    ),
    "gemma3": Family(
        "gemma3_text",
        GEMMA
        | {
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "rope_theta": 2000.0,
                    "factor": 8.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        {
            "window": {"sliding_window": 4096},
            "local rope": {
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "linear",
                        "rope_theta": 2000.0,
                        "factor": 8.0,
                    },
                    "sliding_attention": {"rope_type": "default", "rope_theta": 2000.0},
                }
            },
            "global scaling": {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 2000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                }
            },
            "qk-norm": drop_modules("q_norm", "k_norm"),
            "post norms": drop_modules("post_attention_layernorm", "post_feedforward_layernorm"),
            "query scale": {"query_pre_attn_scalar": 16},
        },
    ),
    # Only the final cap: transformers 5.2 never passes Gemma 3's attention cap on to attention.
    "gemma3_softcap": Family(
        "gemma3_text",
        GEMMA
        | {
            "num_key_value_heads": 1,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 2000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        {
            "final soft-cap": {"final_logit_softcapping": None},
            "window": {"sliding_window": 4096},
        },
        hub_names=False,
    ),
}


def build(family: Family, changes: dict | None = None) -> torch.nn.Module:
    """Returns the family's model with weights drawn from seed 0, in float32 and eager attention."""
    settings = SIZES | family.settings | (changes or {})
    config = AutoConfig.for_model(family.model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.25
        centre = 1.0 if "norm" in name and "gemma" not in family.model_type else 0.0
        parameter.data = noise + centre
    return model.eval()


def hub_config(config: dict, extra: dict) -> dict:
    """Rewrites a config of transformers 5 with the names that published checkpoints carry."""
    config = {k: v for k, v in config.items() if k != "layer_types"} | extra
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        rope = rope["full_attention"]
    if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
        del config["head_dim"]
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    config["torch_dtype"] = config.pop("dtype")
    return config


def save(model: torch.nn.Module, family: Family, folder: Path):
    """Writes config.json and the weights of one family, replacing what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=family.max_shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if family.hub_names:
        config = hub_config(config, family.hub_extra)
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


@torch.inference_mode()
def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> np.ndarray:
    """Returns the logits [B T V]."""
    return model(ids, use_cache=False).logits.numpy()


def without(family: Family, feature: str, ids: torch.Tensor) -> np.ndarray:
    """Returns the logits of the same weights with one feature turned off."""
    change = family.off[feature]
    model = build(family, change if isinstance(change, dict) else None)
    if callable(change):
        change(model)
    return logits_of(model, ids)


def make(name: str, family: Family):
    """Writes one golden folder and prints what its logits are sensitive to."""
    folder = DATA / name
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SIZES["vocab_size"], (2, family.n_tokens), generator=generator)
    save(build(family), family, folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logits = logits_of(model, ids)
    np.savez_compressed(folder / "logits.npz", ids=ids.numpy().astype(np.int32), logits=logits)
    as_built = np.abs(logits - logits_of(build(family), ids)).max()
    rounding = np.abs(logits - logits_of(model.double(), ids)).max()
    size = sum(p.stat().st_size for p in folder.iterdir()) / 1000
    print(
        f"{name}: {size:.0f} kB, logits std {logits.std():.2f}, file {as_built:.1e}, float64 {rounding:.1e}"
    )
    for feature in family.off:
        print(f"    without {feature}: {np.abs(logits - without(family, feature, ids)).max():.3f}")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or FAMILIES:
        make(chosen, FAMILIES[chosen])
