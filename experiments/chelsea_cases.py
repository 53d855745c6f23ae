"""Describes how Chelsea's speed is measured: settings and budgets."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments import results
from kvjax.budgets import Shares
from kvjax.methods.chelsea import Chelsea
from kvjax.model import Model

__all__ = ["Speed", "budget", "chelsea"]


@dataclass(frozen=True)
class Speed:
    """What to time. A case is shape:batch x tokens; shape/8 takes 8 layers of it.

    Args:
        parts: which to run now; a later run of the same command adds others to the same file.
        cases: of the decode step.
        line: of the line: one shape and batch at several lengths.
        throughput: the largest case that the full cache can hold; Chelsea's rows fill the same memory.
        end_to_end: batch x tokens of the prompts.
        cluster: batch x tokens of the prompts.
        streaming: batch x tokens of the prompts.
        keep: Chelsea's budget as a share of the tokens.
        slack: slots that a clustering leaves free.
        steps: decode steps in one call; whole calls make a period, and at least two.
        samples: periods timed, after one that compiles; prefills are timed once, after one that compiles.
        new: tokens that follow the prompts end to end.
        chunk: tokens of a prompt read at once.
        stream_chunk: the same for `streaming`.
        compress: when the prompts of `end_to_end` are clustered, "end" or "chunk".
        prompt_rows: rows whose prefill is timed end to end, 0 = all; the time of fewer is scaled, and the
            row says so.
        copy_mib: what is copied to measure the copy rate.
        seed: of weights, caches, ragged budgets and prompts.
        out: the folder of results.
    """

    parts: tuple[str, ...] = ("decode", "line", "throughput", "end_to_end", "cluster", "streaming")
    cases: tuple[str, ...] = (
        "llama-3.1-8b:8x32768",
        "llama-3.1-8b:1x32768",
        "llama-3.1-8b:1x131072",
        "qwen2.5-1.5b:64x32768",
        "qwen2.5-1.5b:8x32768",
    )
    line: tuple[str, ...] = tuple(f"llama-3.1-8b:1x{n * 1024}" for n in (8, 16, 32, 64, 128))
    throughput: str = "llama-3.1-8b:8x32768"
    end_to_end: str = "llama-3.1-8b:8x32768"
    cluster: str = "llama-3.1-8b:1x32768"
    streaming: str = "llama-3.1-8b:1x131072"
    keep: float = 0.2
    slack: int = 192
    steps: int = 64
    samples: int = 3
    new: int = 1024
    chunk: int = 2048
    stream_chunk: int = 4096
    compress: str = "end"
    prompt_rows: int = 0
    copy_mib: int = 1024
    seed: int = 0
    out: Path = results.FOLDER


def chelsea(settings: Speed, tokens: int, ragged: Model | None = None) -> Chelsea:
    """Returns Chelsea for contexts of `tokens` tokens, with ragged budgets for a model if one is given.

    They are random, of the kind that a calibration finds: one head in eleven takes 3 to 4.5 times the mean,
    the others 0.6 to 0.8 of it.
    """
    mean = budget(settings, tokens)
    method = Chelsea(mean, slack=settings.slack)
    if ragged is None:
        return method
    shape = (ragged.config.n_layers, ragged.config.n_kv_heads)
    rng = np.random.default_rng(settings.seed)
    shares = rng.uniform(0.6, 0.8, math.prod(shape))
    large = rng.choice(shares.size, max(1, round(shares.size / 11)), replace=False)
    shares[large] = rng.uniform(3.0, 4.5, large.size)
    rows = (shares / shares.mean()).reshape(shape).tolist()
    table = Shares(tuple(map(tuple, rows)), ragged.name, settings.keep, tokens).table(mean, method.least)
    return dataclasses.replace(method, budget=table)


def budget(settings: Speed, tokens: int) -> int:
    """Returns Chelsea's slots per KV head for contexts of `tokens` tokens."""
    return int(settings.keep * tokens)
