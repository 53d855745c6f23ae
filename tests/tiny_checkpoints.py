"""Writes tiny checkpoints for tests: GGUF files, Hugging Face folders, raw safetensors."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np

FAMILIES = Path(__file__).parent / "golden" / "data" / "families"
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = GGUF_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
SIZES = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 8,
    "feed_forward_length": 16,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
VOCAB = 12


def gguf_tensors(seed=0, dtype=np.float32):
    """Returns the tensors of a llama of SIZES, [out, in]."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd": (VOCAB, 8), "output_norm": (8,)}
    layer = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
    layer |= {
        "ffn_gate": (16, 8),
        "ffn_up": (16, 8),
        "ffn_down": (8, 16),
        "attn_norm": (8,),
        "ffn_norm": (8,),
    }
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_gguf(path, arch="llama", metadata=None, tensors=None, types=None):
    """Writes a GGUF file; metadata keys without a dot in front belong to the architecture.

    types: tensor name -> quantisation type of raw bytes given for it.
    """
    writer = gguf.GGUFWriter(path, arch)
    own = {f"{arch}.{key}": value for key, value in SIZES.items()} if metadata is None else {}
    for key, value in (own | (metadata or {})).items():
        if value is None:
            continue
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    for name, tensor in (gguf_tensors() if tensors is None else tensors).items():
        writer.add_tensor(name, tensor, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sizes(arch="llama", **changes):
    """Returns the metadata of SIZES under an architecture, with changes (None leaves a key out)."""
    own = {f"{arch}.{key}": value for key, value in SIZES.items()}
    return own | {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}


def byte_vocabulary():
    """Returns the 256 texts that stand for bytes in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def bpe_metadata(pre="smollm", merges=("h e",), extra=("he", "<|end|>"), **more):
    """Returns tokenizer metadata of a byte-level BPE with a few merges; `<...>` are control tokens."""
    tokens = [*byte_vocabulary(), *extra]
    types = [3 if t.startswith("<") and len(t) > 1 else 1 for t in tokens]
    own = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": list(merges)}
    return {f"tokenizer.ggml.{k}": v for k, v in (own | more).items()}


def scored_metadata(pieces, prefix=False, **more):
    """Returns tokenizer metadata of a score-based vocabulary: pieces best first, then bytes."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    types = [3, 3, 3, 2, *[6] * 256, *[1] * len(pieces)]
    scores = [*[0.0] * 260, *(-float(i) for i in range(len(pieces)))]
    own = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    own |= {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "add_space_prefix": prefix}
    return {f"tokenizer.ggml.{k}": v for k, v in (own | more).items()}


def write_safetensors(path, tensors, kinds=None, header=None):
    """Writes a safetensors file from NumPy arrays; `header` edits the header before it is written."""
    entries, data = {}, b""
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor).tobytes()
        kind = (kinds or {}).get(name, names[tensor.dtype.name])
        span = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": span}
        data += raw
    if header is not None:
        entries = header(entries)
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def read_safetensors(folder):
    """Reads all tensors of a folder with the safetensors package."""
    from safetensors.numpy import load_file

    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors
