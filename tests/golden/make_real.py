"""Makes what transformers computes on the real weights of a model (run in two environments).

usage: python tests/golden/make_real.py ids NAME | <peer's python> tests/golden/make_real.py outputs NAME

The first half runs in ours: it finds the GGUF file (after a download, if need be) and makes token
ids with our tokenizer, because transformers' own from a GGUF is another one. The second half runs
in the `peer` extra: transformers reads the same file, dequantises it to float32, and runs eager
attention. Gemma's and Qwen's files both load as they are, so no weight passes through our loader.

<NAME>.json has per prompt: prompt_ids, top20_ids and top20_logits after its last token, mean and
standard deviation of those logits, 16 greedy ids with the margin of each over the second best, and
eager_to_sdpa, how far the same logits move with transformers' other attention (what float32 leaves
undecided). <NAME>.npz has per prompt the negative log-likelihood of every token after the first.

The long prompt is longer than Gemma's window of 512. One process at a time: Qwen needs 10 GB.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data" / "real"
SHORT = (
    "The key-value cache of a transformer grows with every token. For 32,768 tokens it holds\n"
    "2 * 28 * 2 * 128 * 32768 numbers, and so"
)
N_LONG_CHARACTERS = 3300
N_GREEDY = 16
N_TOP = 20


def make_ids(name: str) -> dict:
    """Returns the model's file and the token ids of both prompts."""
    from kvjax.models.hub import fetch
    from kvjax.models.tokenizer import load_tokenizer
    from kvjax.text import PROSE, read_text

    path = fetch(name)
    tokenizer = load_tokenizer(path)
    texts = {"short": SHORT, "long": read_text(PROSE)[:N_LONG_CHARACTERS]}
    return {"path": str(path), "prompts": {key: tokenizer.encode(text) for key, text in texts.items()}}


def open_model(path: str):
    """Returns transformers' model of a GGUF file."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder, file = os.path.split(path)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if wrong := {what: names for what, names in report.items() if names}:
        raise SystemExit(f"transformers finds every weight in the file, got {wrong}")
    print(model.config, file=sys.stderr)
    return model.eval()


def run(model, ids: list[int]) -> tuple[dict, np.ndarray]:
    """Returns one prompt's entry of the JSON, and the NLL of its tokens."""
    import torch

    prompt = torch.tensor([ids])
    with torch.inference_mode():
        out = model(prompt, use_cache=True)
        nll = torch.nn.functional.cross_entropy(out.logits[0, :-1], prompt[0, 1:], reduction="none")
        logits, past = out.logits[0, -1].clone(), out.past_key_values
        del out
        model.set_attn_implementation("sdpa")
        other = model(prompt, use_cache=False, logits_to_keep=1).logits[0, -1]
        model.set_attn_implementation("eager")
        greedy, margins, last = [], [], logits
        for _ in range(N_GREEDY):
            best = last.topk(2)
            greedy.append(best.indices[0].item())
            margins.append(round((best.values[0] - best.values[1]).item(), 5))
            out = model(torch.tensor([greedy[-1:]]), past_key_values=past, use_cache=True)
            past, last = out.past_key_values, out.logits[0, -1]
    top = logits.topk(N_TOP)
    return {
        "prompt_ids": ids,
        "top20_ids": top.indices.tolist(),
        "top20_logits": [round(x, 5) for x in top.values.tolist()],
        "logits_mean": logits.mean().item(),
        "logits_std": logits.std(correction=0).item(),
        "eager_to_sdpa": (logits - other).abs().max().item(),
        "greedy16_ids": greedy,
        "greedy16_top1_minus_top2": margins,
    }, nll.numpy()


def make_outputs(name: str, given: dict) -> None:
    """Writes the JSON and the NLLs of one model."""
    from importlib.metadata import version

    model = open_model(given["path"])
    entries, nlls = {}, {}
    for key, ids in given["prompts"].items():
        entries[key], nlls[key] = run(model, ids)
        print(f"{name} {key}: {len(ids)} tokens, mean NLL {nlls[key].mean():.4f}", file=sys.stderr)
    made_by = ", ".join(f"{package} {version(package)}" for package in ("transformers", "torch", "gguf"))
    entries["_made"] = {"file": Path(given["path"]).name, "by": f"{made_by}, CPU, float32, eager"}
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / f"{name}.json").write_text(_one_line_each(entries), encoding="utf-8")
    np.savez_compressed(DATA / f"{name}.npz", **nlls)


def _one_line_each(entries: dict) -> str:
    """Returns JSON with one line per value, so that a diff shows what moved."""
    parts = []
    for key, entry in entries.items():
        lines = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in entry.items())
        parts.append(f" {json.dumps(key)}: {{\n  {lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    half, model_name = sys.argv[1:]
    if half == "ids":
        json.dump(make_ids(model_name), sys.stdout)
    else:
        make_outputs(model_name, json.load(sys.stdin))
