"""Makes what kvpress keeps of one prompt, press by press (run in the `peer` extra, it needs torch).

usage: python tests/golden/make_kvpress.py

Two tiny random Llamas, one with two query heads per KV head and one with a single one, read a
prompt of 200 distinct tokens (distinct, so that no two keys of the first layer have equal
norms). Per model:

    <model>/            config.json and weights, as make_families.py writes them
    <model>.npz         ids [T], next_ids [n_next], rope_base, n_kept per ratio, and per layer the
                        un-rotated q [T H D], k [T K D], v [T K D]
    <model>_presses.npz per press that scores <press>/scores [L K T], and per press and ratio
                        <press>@<ratio>/kept [L K n_kept] (sorted) and
                        <press>@<ratio>/next_logits [n_next V], the logits of next_ids over the
                        compressed cache, which grows by them

`kept` is read back from the cache: the first channel of the values carries the position while
the press compresses. The script fails unless compression leaves the prompt's own hidden states
untouched, and unless each kept set is decided by a gap that float32 rounding cannot bridge.
"""

from pathlib import Path

import kvpress
import numpy as np
import torch
from make_families import Family, build, save
from transformers import DynamicCache

DATA = Path(__file__).parent / "data" / "kvpress"
RATIOS = (0.5, 0.8)
N_PROMPT, N_NEXT = 200, 4
MODELS = {
    "g2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "g1": {"num_attention_heads": 2, "num_key_value_heads": 2},
}
SHAPE = {"vocab_size": 256, "head_dim": 16, "tie_word_embeddings": True}
PRESSES = {
    "streaming_llm": lambda r: kvpress.StreamingLLMPress(r, n_sink=4),
    "streaming_llm_rerotated": lambda r: kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(r, n_sink=4)),
    "knorm": kvpress.KnormPress,
    "tova": kvpress.TOVAPress,
    "snapkv_w16_k5": lambda r: kvpress.SnapKVPress(r, window_size=16, kernel_size=5),
    "snapkv_w32_k7": lambda r: kvpress.SnapKVPress(r, window_size=32, kernel_size=7),
    "observed_attention": kvpress.ObservedAttentionPress,
}


def record(press) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Makes a press note, layer by layer, its scores [K T] and the positions it keeps [K n_kept]."""
    scores, kept = [], []
    scorer = getattr(press, "press", press)
    score, compress = scorer.score, press.compress

    def noted_score(*args):
        scores.append(score(*args))
        return scores[-1]

    def noted_compress(module, hidden_states, keys, values, attentions, kwargs):
        tagged = values.clone()
        tagged[..., 0] = torch.arange(values.shape[2])
        keys, tagged = compress(module, hidden_states, keys, tagged, attentions, kwargs)
        indices = tagged[..., 0].long()
        kept.append(indices.sort(-1).values)
        return keys, values.gather(2, indices[..., None].expand_as(tagged))

    scorer.score, press.compress = noted_score, noted_compress
    return scores, kept


def capture(model, ids: torch.Tensor) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """Returns the un-rotated q, k, v of every layer, [T heads D] each, and the last hidden states."""
    captured, handles = {}, []
    for index, layer in enumerate(model.model.layers):
        for name in "qkv":

            def note(module, args, output, key=f"layer_{index}/{name}"):
                captured[key] = output[0].unflatten(-1, (-1, model.config.head_dim)).numpy().copy()

            handles.append(getattr(layer.self_attn, f"{name}_proj").register_forward_hook(note))
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return captured, hidden


def gap(scores: torch.Tensor, n_kept: int) -> float:
    """Returns the smallest relative distance between the last score kept and the first dropped."""
    best = scores.sort(-1, descending=True).values
    return float(((best[..., n_kept - 1] - best[..., n_kept]) / best[..., n_kept - 1].abs()).min())


def run(model, press, ids: torch.Tensor, next_ids: torch.Tensor, hidden: torch.Tensor):
    """Returns one press's scores [L K T], kept [L K n_kept], next logits [n_next V] and narrowest gap."""
    scores, kept = record(press)
    cache = DynamicCache()
    with press(model):
        under_press = model.model(input_ids=ids, past_key_values=cache).last_hidden_state
    if not torch.equal(under_press, hidden):
        raise RuntimeError(f"a press changes the cache and nothing else, got other states, {press=}")
    scores, kept = torch.stack(scores)[:, 0], torch.stack(kept)[:, 0]
    narrowest = gap(scores, kept.shape[-1])
    if narrowest < 1e-5:
        raise RuntimeError(f"kept sets need a clear cut, got {narrowest=}, change the seed, {press=}")
    rerotated = isinstance(press, kvpress.KeyRerotationPress)
    start = kept.shape[-1] if rerotated else ids.shape[1]
    positions = torch.arange(start, start + next_ids.shape[1])[None]
    logits = model(input_ids=next_ids, past_key_values=cache, position_ids=positions).logits[0]
    return scores.numpy(), kept.numpy(), logits.numpy(), narrowest


@torch.inference_mode()
def make(name: str, heads: dict):
    """Writes the files of one model."""
    family = Family("llama", SHAPE | heads)
    model = build(family)
    save(model, family, DATA / name)
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(SHAPE["vocab_size"], generator=generator)[None]
    ids, next_ids = order[:, :N_PROMPT], order[:, N_PROMPT : N_PROMPT + N_NEXT]
    captured, hidden = capture(model, ids)
    inputs = captured | {
        "ids": ids[0].numpy().astype(np.int32),
        "next_ids": next_ids[0].numpy().astype(np.int32),
        "rope_base": np.float32(model.config.rope_parameters["rope_theta"]),
    }
    outputs = {}
    for press_name, press_of in PRESSES.items():
        for ratio in RATIOS:
            scores, kept, logits, narrowest = run(model, press_of(ratio), ids, next_ids, hidden)
            inputs[f"n_kept@{ratio}"] = np.int32(kept.shape[-1])
            if "streaming" not in press_name:  # its scores are the kept set itself
                outputs[f"{press_name}/scores"] = scores
            outputs[f"{press_name}@{ratio}/kept"] = kept.astype(np.int32)
            outputs[f"{press_name}@{ratio}/next_logits"] = logits
            print(f"{name} {press_name}@{ratio}: {kept.shape[-1]} kept, narrowest gap {narrowest:.1e}")
    np.savez_compressed(DATA / f"{name}.npz", **inputs)
    np.savez_compressed(DATA / f"{name}_presses.npz", **outputs)


if __name__ == "__main__":
    for model_name, model_heads in MODELS.items():
        make(model_name, model_heads)
