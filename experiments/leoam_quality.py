"""LeoAM's quality: what it loses beside methods that read as many bytes a step.

Each row has a share of the bytes that the full cache's steps read. Methods are given the `topk`, or the
budget, with which they read as many, their own index included: all of it, so what LeoAM's tree leaves unread
of its abstracts is not credited. A method whose index alone takes more reads one leaf, or page; what each has
read is in its row. A²ATS reads the union of what a group's heads choose: its share is found by one trial.

The rest of each document is decoded step by step, since prompts are read in full.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

import kvjax
from experiments import quality_plot, results
from experiments.a2ats_quality import Tried, row_of
from experiments.counted import Counted, budget_of, reads
from experiments.rows import check_apart, claims, measured, side_by_side, start
from kvjax import measure, spec, states, text
from kvjax.calibrate import chunks, codebooks
from kvjax.method import CacheMethod
from kvjax.methods import per_layer
from kvjax.methods.a2ats import A2ATS
from kvjax.methods.full import Full
from kvjax.methods.leoam import LeoAM

__all__ = ["Quality", "quality"]

_FULL = {"name": "full", "share": 1.0, "spec": "Full()"}


@dataclass(frozen=True)
class Quality:
    """What to compare at equal bytes read.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        texts: text files, or pydoc_data.topics, none that was learned from; the first also hides
            pass keys.
        docs: documents that are scored.
        context: tokens of a prompt.
        rest: tokens after it that are predicted.
        shares: of the bytes that the full cache's steps read.
        methods: such as leoam:known_by=mean, which are given a topk, or quest, a budget.
        learned: text files, or pydoc_data.topics, that LeoAM's chunks are fitted on, a document of each; none
            leaves such rows out.
        calibration: a folder of `kvjax calibrate a2ats`; None leaves A²ATS out.
        keys: pass keys in filler.
        novel_keys: pass keys in the first text, of those that the full cache finds.
        key_context: tokens of a text that hides a key.
        seed: chooses documents and keys.
        workers: rows that are measured side by side.
        out: the folder of results.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    texts: tuple[str, ...] = (text.PROSE,)
    docs: int = 4
    context: int = 4096
    rest: int = 256
    shares: tuple[float, ...] = (0.05, 0.1, 0.2)
    methods: tuple[str, ...] = (
        "leoam",
        "leoam:leaf=32",
        "leoam:known_by=mean",
        "leoam:known_by=box",
        "quest:dense_layers=0",
    )
    learned: tuple[str, ...] = ()
    calibration: Path | None = None
    keys: int = 30
    novel_keys: int = 25
    key_context: int = 1024
    seed: int = 0
    workers: int = 1
    out: Path = results.FOLDER


def quality(settings: Quality) -> int:
    """Scores each method at each share that is not stored yet, prints the rows and draws them.

    Raises:
        ValueError: for a method that neither topk nor budget makes read more.
    """
    if settings.learned:
        check_apart("chunks", settings)
    model = kvjax.load(settings.model, settings.dtype)
    for name in settings.methods:  # what will fail, fails before the first row
        _method(name, 0, model, settings.key_context)
    books = None if settings.calibration is None else codebooks.load(settings.calibration, model)
    tried = Tried(settings, model)
    stored = measured(start("leoam", "quality", settings), _FULL, lambda: tried.figures(lambda where: Full()))
    full, tries = stored.find(_FULL), []
    for share in settings.shares:
        makers = {name: functools.partial(_of_share, name, share, full, model) for name in settings.methods}
        named = [({"name": name, "share": share, "spec": name}, make) for name, make in makers.items()]
        if settings.learned:
            fitted = functools.cache(functools.partial(_fitted, settings, model, share))
            row = {"name": "leoam, fitted", "share": share, "spec": "leoam"}
            named.append((row, functools.partial(_of_share, fitted, share, full, model)))
        if books is not None:
            method = A2ATS(share, books, window=books.window, far=books.far)
            row = row_of(method) | {"share": share, "spec": "a2ats"}
            row.pop("ratio")
            named.append((row, functools.partial(_a2ats, method, full, tried)))
        tries += [(row, functools.partial(tried.figures, make, full)) for row, make in named]
    stored = side_by_side(stored, tries, settings.workers)
    rows = [full, *(stored.find(row) for row, _ in tries)]
    stored = stored.claim(claims(settings.model, rows, "share"))
    label = "bytes read in a decode step, share of the full cache's"
    quality_plot.draw(rows, stored.path.with_suffix(".png"), "read", label)
    print(stored.path)
    return 0


def _fitted(settings: Quality, model: kvjax.Model, share: float) -> LeoAM:
    """Returns LeoAM with chunks that are fitted to layers on other texts."""
    ids = text.documents(
        model.tokenizer, settings.learned, len(settings.learned), settings.context, settings.seed
    )
    return chunks.fit(model, LeoAM(share), ids)


def _of_share(
    name: str | Callable[[], LeoAM], share: float, full: Mapping[str, Any], model: kvjax.Model, where: str
) -> CacheMethod:
    """Returns a method that reads a share of what the full cache's steps read in a text."""
    ending = "" if where == "prose" else f"_{where}"
    wanted, seen = share * full[f"bytes_read{ending}"], int(full[f"tokens{ending}"])
    given = (wanted, model, seen)
    return _method(name, *given) if isinstance(name, str) else _with_bytes(name(), *given)


def _method(name: str, wanted: float, model: kvjax.Model, seen: int) -> CacheMethod:
    """Returns the method whose steps read the wanted bytes of so many tokens, to the nearest leaf or page."""
    known = spec.settings_of(name)
    if "budget" in known:
        return spec.parse(name, budget=budget_of(name, wanted, model, seen))
    if "topk" not in known or not name.startswith("leoam"):
        raise ValueError(f"a method is given bytes by its budget, or is leoam, got {name!r}: leave it out")
    return _with_bytes(spec.parse(name, topk=1), wanted, model, seen)


def _with_bytes(method: LeoAM, wanted: float, model: kvjax.Model, seen: int) -> LeoAM:
    """Returns LeoAM with the topk whose steps read the wanted bytes of so many tokens, in whole leaves."""
    leaf = max(method.leaf) if isinstance(method.leaf, tuple) else method.leaf
    first, more = (_planned(replace(method, topk=n), model, seen) for n in (leaf, 2 * leaf))
    n = 1 + max(0.0, (wanted - first) / (more - first))
    # The newest leaf is half full, and the window's first may be, too: about a leaf is not read.
    return replace(method, topk=min(leaf * round(n + 0.5), seen // leaf * leaf))


def _planned(method: CacheMethod, model: kvjax.Model, seen: int) -> float:
    """Returns the bytes that a step reads of `seen` tokens in layers without a window, from shapes."""
    state = jax.eval_shape(lambda: states.init_state(model, method, 1, seen))
    pairs = zip(state, per_layer(method, model.config), strict=True)
    return measure.bytes_read(*zip(*[(kv, m) for kv, m in pairs if kv.layer.window is None], strict=True))


def _a2ats(method: A2ATS, full: Mapping[str, Any], tried: Tried, where: str) -> CacheMethod:
    """Returns A²ATS with the share that makes it read as many bytes as its `topk` of the full cache's.

    What it reads grows with the share as it does between none and a trial's, a third of the tokens wanted.
    """
    if where != "prose":
        return _a2ats(method, full, tried, "prose")
    trial, part = replace(method, topk=max(method.topk / 3, 0.002)), tried.part("prose")
    read = []
    for one in (replace(method, topk=1), trial):
        counted = Counted(one)
        _, state = part.scores(counted, part.compressed(counted))
        read.append(reads(state, counted, tried.model)["bytes_read"])
    least, more = read
    grown = (method.topk * full["bytes_read"] - least) / (more - least)
    return replace(method, topk=float(min(1.0, max(trial.topk * grown, 1e-4))))
