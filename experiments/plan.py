"""Lists the rows of a comparison: methods, budgets, and whether compression sees the question."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from kvjax import spec
from kvjax.cache import Layer
from kvjax.method import CacheMethod
from kvjax.methods import layers, per_layer
from kvjax.models.config import ModelConfig

__all__ = ["Methods", "Trial", "plan"]

_EXTRA = ("snapkv+kivi4",)  # what chains can do, beside every method by itself

Methods = Mapping[str, type[CacheMethod]]


@dataclass(frozen=True)
class Trial:
    """One row: a method under its name, its budget as a share and in tokens, the question's mode."""

    name: str
    method: CacheMethod
    ratio: float
    budget: int
    question: str  # "unseen" or "seen" by the compression

    def layers(self, config: ModelConfig) -> Iterator[tuple[CacheMethod, Layer]]:
        """Yields the method and the settings of each layer of a model."""
        return zip(per_layer(self.method, config), layers(config), strict=True)


def plan(
    names: Sequence[str], budgets: Sequence[float], total: int, methods: Methods, **given: Any
) -> list[Trial]:
    """Returns the rows of the table, the full cache first.

    Methods that evict have a row for each budget and mode; the others never lose what a later
    question needs, so they have the unseen mode only, and without a budget one row. A method that
    has `topk` and no budget takes the share.

    Args:
        names: methods; none takes all of which every setting is known.
        given: settings for methods that have them, such as a calibration.

    Raises:
        ValueError: for an unknown method or setting, or a budget that is no share.
    """
    for ratio in budgets:
        if not 0 < ratio <= 1:
            near = 1 / ratio if ratio > 1 else 0.5
            raise ValueError(f"a budget is a share in (0, 1], got {ratio}: did you mean {near:.3g}?")
    ratios = sorted({r for r in budgets if r < 1}, reverse=True)
    trials = [Trial("full", spec.parse("full"), 1.0, total, "unseen")]
    for name in names or _all(methods, given):
        open_settings = spec.settings_of(name, methods)
        if sizes := open_settings & {"budget", "topk"}:
            made = [(spec.parse(name, methods, **_sizes(sizes, r, total), **given), r) for r in ratios]
            if not ratios:  # the name is checked all the same
                spec.parse(name, methods, **_sizes(sizes, 1.0, total), **given)
        else:
            made = [(spec.parse(name, methods, **given), 1.0)]
        for question in ("unseen", "seen"):
            trials += [
                Trial(name, m, r, _tokens(r, total), question)
                for m, r in made
                if m.evicts or question == "unseen"
            ]
    return list({(t.name, t.ratio, t.question): t for t in trials}.values())


def _tokens(ratio: float, total: int) -> int:
    return max(1, round(ratio * total))


def _sizes(names: set[str], ratio: float, total: int) -> dict[str, Any]:
    """Returns the settings that say how much is kept or read: tokens, or a share."""
    return {"budget": _tokens(ratio, total)} if "budget" in names else {"topk": ratio}


def _all(methods: Methods, given: Mapping[str, Any]) -> list[str]:
    """Returns every method by name, storage in both widths, and the chains worth a look."""
    names = []
    for name, kind in methods.items():
        needed = {f.name for f in fields(kind) if f.default is MISSING} - {"budget", "topk"} - given.keys()
        if needed:
            continue
        names += [f"{name}{bits}" for bits in (8, 4)] if "bits" in spec.settings_of(name, methods) else [name]
    return [*names, *_EXTRA]
