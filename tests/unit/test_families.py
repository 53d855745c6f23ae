"""Reads the configurations that models were published with, and refuses what we lack."""

import numpy as np
import pytest
from tiny_checkpoints import FAMILIES as GOLDEN
from tiny_checkpoints import gguf_tensors, sizes, write_gguf

from kvjax.models.config import RopeConfig
from kvjax.models.families import config_from_hf
from kvjax.models.gguf_config import config_from_gguf, rope_from_factors
from kvjax.models.gguf_file import GGUFFile
from kvjax.models.weights import read_config

LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
MISTRAL_7B = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN2_5 = {
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = QWEN2_5 | {"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128}
QWEN3 |= {"num_key_value_heads": 8, "sliding_window": None, "attention_bias": False}
GEMMA2_27B = {
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 128,
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "vocab_size": 256000,
}
GEMMA3_4B = {  # published like this: everything else is a default of transformers
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}


def test_llama_3_2():
    config = config_from_hf(LLAMA_3_2_1B)
    assert config.rope == RopeConfig(500000.0, "llama3", 32.0, 8192, 1.0, 4.0)
    assert (config.context_length, config.query_scale, config.n_params()) == (131072, 0.125, 1_235_814_400)
    assert config.layer_windows == (None,) * 16
    assert not config.qkv_bias


def test_smollm2_is_a_llama_by_the_folder_too():
    raw = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    raw |= {"num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "vocab_size": 49152}
    raw |= {"rope_theta": 100000, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    config = config_from_hf(raw | {"rope_interleaved": False, "is_llama_config": True, "rope_scaling": None})
    assert (config.family, config.head_dim, config.rope, config.n_params()) == (
        "llama",
        64,
        RopeConfig(1e5),
        134_515_008,
    )


def test_mistral_windows_every_layer():
    config = config_from_hf(MISTRAL_7B)
    assert config.layer_windows == (4096,) * 32
    assert config.n_params() == 7_241_732_096
    assert config_from_hf(MISTRAL_7B | {"sliding_window": None}).layer_windows == (None,) * 32


def test_qwen2():
    config = config_from_hf(QWEN2_5)
    assert (config.qkv_bias, config.o_bias, config.n_params()) == (True, False, 494_032_768)
    assert config.layer_windows == (None,) * 24
    windowed = config_from_hf(QWEN2_5 | {"use_sliding_window": True, "sliding_window": 100})
    assert windowed.layer_windows == (None,) * 21 + (100,) * 3


def test_qwen3():
    config = config_from_hf(QWEN3 | {"intermediate_size": 3072, "num_hidden_layers": 28})
    assert (config.qk_norm, config.qkv_bias, config.head_dim, config.n_params()) == (
        True,
        False,
        128,
        596_049_920,
    )


def test_gemma2():
    config = config_from_hf(GEMMA2_27B)
    assert config.layer_windows == (4096, None) * 23
    assert (config.query_scale, config.attn_softcap, config.final_softcap) == (1 / 12, 50.0, 30.0)
    assert (config.embed_scale, config.act, config.post_norms, config.qk_norm) == (
        4608**0.5,
        "gelu_tanh",
        True,
        False,
    )
    assert (config.tied_embeddings, config.local_rope, config.rope.base) == (True, None, 1e4)


def test_gemma3_inside_a_multimodal_config():
    config = config_from_hf(GEMMA3_4B)
    assert (config.family, config.vocab_size, config.n_heads, config.n_kv_heads) == ("gemma3", 262208, 8, 4)
    assert config.layer_windows[:7] == (1024,) * 5 + (None, 1024)
    assert config.rope == RopeConfig(1e6, "linear", 8.0)
    assert config.local_rope == RopeConfig(1e4)
    assert config.rope_of(0) == config.local_rope
    assert config.rope_of(5) == config.rope
    assert (config.query_scale, config.attn_softcap) == (1 / 16, None)
    assert config.n_params() == 3_880_263_168


def test_both_generations_of_names_mean_the_same():
    new = {k: v for k, v in LLAMA_3_2_1B.items() if not k.startswith("rope_")}
    new["rope_parameters"] = LLAMA3 | {"rope_theta": 500000.0}
    assert config_from_hf(new) == config_from_hf(LLAMA_3_2_1B)
    old = GEMMA3_4B["text_config"]
    text = {k: v for k, v in old.items() if k != "rope_scaling"}
    text["layer_types"] = (["sliding_attention"] * 5 + ["full_attention"]) * 5 + ["sliding_attention"] * 4
    text["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert config_from_hf(text) == config_from_hf(GEMMA3_4B)


def test_yarn_extends_the_context():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = config_from_hf(QWEN2_5 | {"rope_scaling": scaling})
    assert config.rope == RopeConfig(1e6, "yarn", 4.0, 32768)
    assert config.context_length == 131072
    scaled = config_from_hf(QWEN2_5 | {"rope_scaling": scaling | {"mscale": 1.0, "mscale_all_dim": 0.5}})
    assert scaled.rope.attention_factor == pytest.approx((0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1))
    given = config_from_hf(QWEN2_5 | {"rope_scaling": scaling | {"attention_factor": 1.5, "beta_fast": 16}})
    assert (given.rope.attention_factor, given.rope.beta_fast) == (1.5, 16.0)


@pytest.mark.parametrize("folder", sorted(p.name for p in GOLDEN.iterdir() if p.is_dir()))
def test_every_golden_folder_is_read(folder):
    assert read_config(GOLDEN / folder).family in folder


def test_attention_bias_is_on_all_four():
    config = config_from_hf(LLAMA_3_2_1B | {"attention_bias": True})
    assert (config.qkv_bias, config.o_bias) == (True, True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "lama"}, "architectures read are .*got 'lama'; the nearest is 'llama'"),
        ({"model_type": "qwen3_moe"}, "nearest is 'qwen3'"),
        ({"mlp_bias": True}, "no 'mlp_bias', got True"),
        ({"num_local_experts": 8}, "no 'num_local_experts'"),
        ({"quantization_config": {"quant_method": "awq"}}, "no 'quantization_config'"),
        ({"rope_interleaved": True}, "no 'rope_interleaved'"),
        ({"partial_rotary_factor": 0.5}, "covers the whole head"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rotary scalings are .*got 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "untruncated YaRN"),
        ({"hidden_act": "relu"}, "activations are .*got 'relu'"),
    ],
)
def test_what_the_decoder_lacks_is_refused(change, match):
    with pytest.raises(NotImplementedError, match=match):
        config_from_hf(LLAMA_3_2_1B | change)


def test_bidirectional_gemma_is_refused():
    with pytest.raises(NotImplementedError, match="no 'use_bidirectional_attention'"):
        config_from_hf(GEMMA3_4B["text_config"] | {"use_bidirectional_attention": True})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": None}, "positive int up to .* for 'hidden_size', got value=None"),
        ({"hidden_size": "576"}, "'hidden_size', got value='576'"),
        ({"num_hidden_layers": 10**9}, "up to 4096 for 'num_hidden_layers'"),
        ({"num_attention_heads": 0}, "'num_attention_heads', got value=0"),
        ({"vocab_size": 3.5}, "'vocab_size'"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps'"),
        ({"rope_theta": -1.0}, "'rope_theta'"),
        ({"num_key_value_heads": 7}, "equal groups"),
        ({"rope_scaling": 3}, "rotary settings are an object"),
        ({"rope_parameters": {"full_attention": 3}}, "rotary settings are an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor', got value=None"),
    ],
)
def test_impossible_sizes_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        config_from_hf(LLAMA_3_2_1B | change)


@pytest.mark.parametrize("types", [["full_attention"], ["chunked_attention"] * 24, "full_attention"])
def test_impossible_layer_types_are_refused(types):
    with pytest.raises(ValueError, match="layer_types holds full_attention or sliding_attention"):
        config_from_hf(QWEN2_5 | {"use_sliding_window": True, "layer_types": types})


def test_other_impossible_values_are_refused():
    with pytest.raises(ValueError, match="max_window_layers is a number"):
        config_from_hf(QWEN2_5 | {"use_sliding_window": True, "max_window_layers": "all"})
    with pytest.raises(ValueError, match="holds its 'text_config', got"):
        config_from_hf({"model_type": "gemma3"})


def gguf_config(tmp_path, arch="llama", tensors=(), **changes):
    path = write_gguf(tmp_path / "x.gguf", arch, sizes(arch, **changes), gguf_tensors() | dict(tensors))
    return config_from_gguf(GGUFFile(path))


def llama3_factors(base, factor, original, n=32, low=1.0, high=4.0):
    """Returns Llama 3's divisors of the frequencies, one at a time as the paper's code does."""
    factors = []
    for i in range(n):
        wave = 2 * np.pi * base ** (i / n)
        if wave < original / high:
            factors.append(1.0)
        elif wave > original / low:
            factors.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (8.0, 1024)])
def test_llama_3_scaling_is_found_in_its_tensor(factor, original):
    rope = rope_from_factors(llama3_factors(500000.0, factor, original, n=64), 500000.0)
    assert (rope.scaling, rope.factor, rope.low_freq_factor) == ("llama3", factor, 1.0)
    assert rope.original_context == pytest.approx(original, rel=1e-3)
    assert rope.high_freq_factor == pytest.approx(4.0, abs=0.02)


@pytest.mark.parametrize("factors", [np.linspace(1, 9, 32), np.full(32, np.nan), np.zeros(32), np.ones(32)])
def test_other_factors_are_refused(factors):
    with pytest.raises(NotImplementedError, match="where it is Llama 3's frequency scaling"):
        rope_from_factors(factors, 500000.0)


def test_llama_3_scaling_in_a_file(tmp_path):
    factors = llama3_factors(1e9, 8.0, 8192, n=2)
    assert factors.tolist() == [1.0, 8.0]
    config = gguf_config(tmp_path, tensors={"rope_freqs.weight": factors}, rope__freq_base=1e9)
    assert config.rope == RopeConfig(1e9, "llama3", 8.0, 8192, 1.0, 4.0)
    with pytest.raises(NotImplementedError, match="Llama 3"):
        gguf_config(tmp_path, tensors={"rope_freqs.weight": factors[::-1].copy()}, rope__freq_base=1e9)
    with pytest.raises(ValueError, match="one factor for each pair of a head, got"):
        gguf_config(tmp_path, tensors={"rope_freqs.weight": np.ones(3, np.float32)})


def test_gguf_scalings(tmp_path):
    linear = gguf_config(tmp_path, rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert linear.rope == RopeConfig(1e4, "linear", 8.0)
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__freq_base": 1e6}
    yarn |= {"rope__scaling__original_context_length": 32, "rope__scaling__yarn_beta_fast": 16.0}
    assert gguf_config(tmp_path, **yarn).rope == RopeConfig(1e6, "yarn", 4.0, 32, beta_fast=16.0)
    with pytest.raises(NotImplementedError, match="got 'longrope'"):
        gguf_config(tmp_path, rope__scaling__type="longrope", rope__scaling__factor=4.0)


def test_gemma3_gguf_knows_what_the_file_leaves_out(tmp_path):
    own = {"attention__sliding_window": 16, "block_count": 7, "rope__freq_base": 1e6}
    own |= {"attention__key_length": 4, "attention__value_length": 4}
    config = gguf_config(tmp_path, "gemma3", **own)
    assert config.layer_windows == (16,) * 5 + (None, 16)
    assert (config.rope, config.local_rope) == (RopeConfig(1e6), RopeConfig(1e4))
    assert (config.embed_scale, config.query_scale, config.post_norms, config.qk_norm) == (
        8**0.5,
        0.5,
        True,
        True,
    )
    wide = gguf_config(tmp_path, "gemma3", **own | {"block_count": 62, "embedding_length": 32})
    assert wide.query_scale == 0.25
    flags = [True, False] * 3 + [True]
    listed = gguf_config(tmp_path, "gemma3", **own | {"attention__sliding_window_pattern": flags})
    assert listed.layer_windows == (16, None) * 3 + (16,)
    with pytest.raises(ValueError, match="one flag per layer, got 1"):
        gguf_config(tmp_path, "gemma3", **own | {"attention__sliding_window_pattern": [True]})


def test_gemma2_gguf(tmp_path):
    own = {"attention__sliding_window": 16, "block_count": 4, "attn_logit_softcapping": 50.0}
    config = gguf_config(tmp_path, "gemma2", **own)
    assert config.layer_windows == (16, None, 16, None)
    assert (config.attn_softcap, config.final_softcap, config.local_rope) == (50.0, None, None)


def test_gguf_biases_head_and_windows(tmp_path):
    extra = {"blk.0.attn_q.bias": np.zeros(8, np.float32), "output.weight": np.zeros((12, 8), np.float32)}
    config = gguf_config(tmp_path, "qwen2", extra)
    assert (config.qkv_bias, config.o_bias, config.tied_embeddings) == (True, False, False)
    assert gguf_config(tmp_path, attention__sliding_window=16).layer_windows == (16,)
    assert gguf_config(tmp_path, attention__sliding_window=64).layer_windows == (None,)
    with pytest.raises(NotImplementedError, match="do not say which layers have a window"):
        gguf_config(tmp_path, "qwen2", attention__sliding_window=16)


def test_gguf_sizes_per_layer(tmp_path):
    assert gguf_config(tmp_path, attention__head_count_kv=[2, 2], block_count=2).n_kv_heads == 2
    with pytest.raises(NotImplementedError, match="layers are of one size"):
        gguf_config(tmp_path, attention__head_count_kv=[1, 2], block_count=2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"expert_count": 8}, "dense layers.*got expert_count=8"),
        ({"rope__dimension_count": 2}, "rotated as a whole.*got rope.dimension_count=2"),
        ({"attention__value_length": 2}, "got attention.value_length=2"),
    ],
)
def test_what_the_decoder_lacks_is_refused_in_gguf(changes, match, tmp_path):
    with pytest.raises(NotImplementedError, match=match):
        gguf_config(tmp_path, **changes)


def test_unknown_gguf_architecture(tmp_path):
    with pytest.raises(NotImplementedError, match="got 'qwen2moe'; the nearest is 'qwen2'"):
        gguf_config(tmp_path, "qwen2moe")


def test_gguf_without_a_size(tmp_path):
    with pytest.raises(ValueError, match="'block_count', got value=None"):
        gguf_config(tmp_path, block_count=None)
