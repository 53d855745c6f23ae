"""Counts what LeoAM's steps read from a disk on real models, by the tokens of a chunk.

What each step chooses is recorded once, with K and V on the device; lines on the device and chunks on the
host are simulated, see `lru`: those that were read, or asked for, longest ago make room. The device holds a
multiple of the leaves that a step may read, the host a share of the layer's K and V, seals included. Nothing
is read ahead. The first 64 steps fill both and are not counted.

A chunk smaller than a leaf cannot be; one that is larger brings its other leaves, whether they matter or not.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

import kvjax
from experiments import results
from experiments.lru import asked_chunks, lru_missed, needed_lines, tier_crossed
from experiments.rows import measured, start
from experiments.selections import Steps, record
from kvjax import blocks, spec, text, tiers

__all__ = ["Reads", "reads"]


@dataclass(frozen=True)
class Reads:
    """Whose steps to record, and what to keep of what they read.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: text files, or pydoc_data.topics.
        docs: documents.
        context: tokens of a prompt.
        rest: tokens after it, each a decode step; the first 64 are not counted.
        topk: share of the tokens that a step chooses.
        methods: LeoAM's settings otherwise.
        chunks: tokens of a KV head that are read together; of a method, those of whole leaves.
        device: leaves on the device, in units of what a step may read.
        host: bytes of chunks on the host, as a share of those of K and V.
        row_bytes: of a token's key and value in a head, which seals are added to.
        seed: chooses documents.
        out: the folder of results.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    docs: int = 1
    context: int = 7168
    rest: int = 256
    topk: float = 0.035
    methods: tuple[str, ...] = ("leoam:leaf=16", "leoam:leaf=32,known_by=mean")
    chunks: tuple[int, ...] = (16, 32, 64, 128)
    device: tuple[float, ...] = (1.1, 2)
    host: tuple[float, ...] = (0.05, 0.1, 0.2)
    row_bytes: int = 512
    seed: int = 0
    out: Path = results.FOLDER


def reads(settings: Reads) -> int:
    """Counts what is not stored yet, prints the rows and claims their figures.

    Raises:
        ValueError: for no step that counts, or lines for less than a step.
    """
    if settings.rest <= tiers.STEPS or min(settings.device, default=0) < 1:
        raise ValueError(
            f"steps after the first {tiers.STEPS} are counted, with lines for one step or more, got "
            f"{settings.rest=}, {settings.device=}"
        )
    model, stored, claims = kvjax.load(settings.model, settings.dtype), start("leoam", "reads", settings), {}
    for name in settings.methods:
        tried = _Tried(settings, model, name)
        for chunk in (n for n in settings.chunks if n % tried.leaf == 0):
            for device, host in ((d, h) for d in settings.device for h in settings.host):
                row = {"name": name, "chunk": chunk, "device": device, "host": host}
                stored = measured(stored, row, functools.partial(tried.figures, chunk, device, host))
                claim, found = f"{settings.model.split('-')[0]}.{name}.c{chunk}", stored.find(row)
                for k in ("disk_chunks", "disk_bytes"):
                    claims[f"{claim}.{k}@{device:g},{host:g}"] = found[k]
    stored = stored.claim(claims)
    print(stored.path)
    return 0


@dataclass(eq=False)
class _Tried:
    """What one method's steps have chosen."""

    settings: Reads
    model: kvjax.Model
    name: str

    @functools.cached_property
    def method(self) -> Any:
        return spec.parse(self.name, topk=self.settings.topk)

    @property
    def leaf(self) -> int:
        return self.method.leaf

    @functools.cached_property
    def steps(self) -> list[Steps]:
        """Of each layer that chooses."""
        s = self.settings
        documents = text.documents(self.model.tokenizer, s.texts, s.docs, s.context + s.rest, s.seed)
        return list(record(self.model, self.method, documents, s.rest).values())

    def figures(self, chunk: int, device: float, host: float) -> dict[str, Any]:
        """Returns what a step of a KV head reads where, means over layers and documents."""
        stride, counts = blocks.stride_of(chunk * self.settings.row_bytes), []
        layers = zip(self.steps, self.crossed(device), self.asked(chunk, device), strict=True)
        for steps, crosses, (chunks, missed) in layers:
            n_docs, n_heads, n_steps = steps.slot.shape[:3]
            n_pool = int(host * n_heads * steps.size * self.settings.row_bytes / stride)
            each = (
                (steps.blocks(self.leaf) >= 0).sum((0, 1, 3)),
                crosses.sum((0, 1, 3)),
                (chunks.slot >= 0).sum((0, 1, 3)),
                missed[:, min(n_pool, chunks.size)],
            )
            counted = (n_steps - tiers.STEPS) * n_docs * n_heads
            counts.append([x[tiers.STEPS :].sum() / counted for x in each])
        chosen, crossed, asked, read = (float(x) for x in np.mean(counts, axis=0))
        return {
            "chosen": chosen,
            "crossed": crossed,
            "asked_chunks": asked,
            "disk_chunks": read,
            "disk_bytes": read * stride,
            "share_of_chosen": read * stride / (chosen * self.leaf * self.settings.row_bytes),
        }

    @functools.lru_cache(maxsize=1)  # noqa: B019, of all chunks and hosts: one after the other
    def crossed(self, device: float) -> list[Bool[np.ndarray, "B K T N"]]:
        """Returns which leaves cross the bus, of each layer."""
        lines = (int(device * needed_lines(steps, self.leaf)) for steps in self.steps)
        return [tier_crossed(s, self.leaf, n) for s, n in zip(self.steps, lines, strict=True)]

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def asked(self, chunk: int, device: float) -> list[tuple[Steps, Int[np.ndarray, "T C"]]]:
        """Returns the chunks asked for of each layer, and how many are read with 0, 1, ... on the host."""
        both = zip(self.steps, self.crossed(device), strict=True)
        asked = [asked_chunks(steps, self.leaf, crossed, chunk) for steps, crossed in both]
        return [(steps, lru_missed(steps)) for steps in asked]
