"""Writes what the four systems reach, and where they fall short, for the README; see `quote`."""

from experiments import results
from experiments.quote_methods import PROSE

__all__ = ["table"]

_SHARE, _HOST = f"quality {PROSE} --keeps 0.2 0.25", "speed --bits 8 --topk 0.015 --hit-rate 0.94"
_ALONE = "speed --pattern experiments/results/chess_quality/cpu-2026-11-26.json --samples"
_H100 = "NVIDIA H100"
# System, what (x: how many times as fast), how it is written, what was wanted, command, claim, maybe device.
_FIGURES = (
    ("chelsea", "KL to the full cache, a fifth of the slots, refined budgets, SmolLM2", ".4f", "0.030",
     _SHARE, "smollm2.chelsea_refined.kl@0.2"),
    ("chelsea", "that of H2O with budgets refined like them", ".4f", "",
     _SHARE, "smollm2.h2o_refined.kl@0.2"),
    ("chelsea", "decode step, 1.5B shape, 64 rows of 32,768 tokens, a fifth kept", "x", "3.19x",
     "speed --cases", "chelsea.decode_speedup_qwen_b64_32k", _H100),
    ("chelsea", "clustering a prompt of 32,768 tokens, of its prefill", ".1%", "2%",
     "speed --cases", "chelsea.cluster_share_of_prefill", _H100),
    ("chelsea", "a prompt of 32,768 tokens and 1,024 after it", "x", "2.72x",
     "speed --prompt-rows 2", "chelsea.end_to_end_speedup"),
    ("a2ats", "tokens a second, 131,072 of context on the host, all rows that fit", "x", "2.70x",
     _HOST, "a2ats.throughput_speedup_128k_8bit"),
    ("a2ats", "step of one row of 32,768", "x", "", _HOST, "a2ats.step_speedup_llama_b1_32k"),
    ("leoam", "step of 8 rows of 32,768 on a disk, beside the full cache streamed from there", "x", "5.47x",
     "speed --cases llama-3.1-8b:8x32768", "leoam.latency_speedup_batch8"),
    ("leoam", "step of one row of LongChat's, beside fixed chunks, 64 for both", "x", "3.46x",
     "speed --cases longchat-7b:1x32768", "leoam.speedup_over_fixed_longchat_b1_32k"),
    ("leoam", "the same, beside as many of them as catch as much attention", "x", "3.46x",
     "speed --cases longchat-7b:1x32768", "leoam.speedup_over_fixed-equal_longchat_b1_32k"),
    ("leoam", "step of 4 rows of LongChat's, 16 layers, beside fixed chunks, 32 for both", "x", "3.46x",
     "speed --cases longchat-7b/16", "leoam.speedup_over_fixed_longchat_l16_b4_32k"),
    ("leoam", "the same, beside as many of them as catch as much attention", "x", "3.46x",
     "speed --cases longchat-7b/16", "leoam.speedup_over_fixed-equal_longchat_l16_b4_32k"),
    ("leoam", "step of 8 rows of LongChat's, 4 layers, beside the full cache from the disk", "x", "5.47x",
     "speed --cases longchat-7b/4", "leoam.speedup_over_full_longchat_l4_b8_32k"),
    ("leoam", "step of 8 rows of LongChat's, 8 layers, beside fixed chunks, 32 for both", "x", "5.47x",
     "speed --cases longchat-7b/8", "leoam.speedup_over_fixed_longchat_l8_b8_32k"),
    ("leoam", "the same, beside as many of them as catch as much attention", "x", "5.47x",
     "speed --cases longchat-7b/8", "leoam.speedup_over_fixed-equal_longchat_l8_b8_32k"),
    ("chess", "step of one row, half of the activations, beside the dense model", "x", "1.27x",
     _ALONE, "chess.decode_speedup_50"),
    ("chess", "the same, 70% of them", "x", "1.50x", _ALONE, "chess.decode_speedup_70"),
)  # fmt: skip
_NAMES = {"chelsea": "Chelsea", "a2ats": "A²ATS", "leoam": "LeoAM", "chess": "CHESS"}


def table() -> str:
    """Returns a line for each figure, of the newest run that has it, on a device if one is named."""
    lines = [
        "| system | what (x: times as fast as the full cache, or as is said) | measured | wanted | stored |",
        "|---|---|---|---|---|",
    ]
    for name, words, how, wanted, command, claim, *device in _FIGURES:
        folder = f"{name}_{command.split()[0]}"
        stored, path = results.newest(name, f" {command}", folder, claim=claim, device="".join(device))
        value = stored["claims"][claim]
        figure = f"{value:.2f}x" if how == "x" else f"{value:{how}}"
        page = f"[{_NAMES[name]}](docs/methods/{name}.md)"
        lines.append(f"| {page} | {words} | {figure} | {wanted} | [{stored['commit'][:7]}]({path}) |")
    return "\n".join(lines) + "\n"
