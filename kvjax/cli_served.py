"""What the commands that read text have in common: a model, and a method with what it was calibrated to."""

from dataclasses import dataclass
from pathlib import Path

import kvjax
from kvjax import budgets, spec, thresholds
from kvjax.calibrate import codebooks
from kvjax.cli_calibrate import check_tokenizer
from kvjax.method import CacheMethod
from kvjax.model import Model
from kvjax.models.quantize import quantize

__all__ = ["Served"]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model and a method.

    Args:
        model: a name (see `kvjax models`), hf:org/name, or a path.
        dtype: float32 or bfloat16; by default the device's.
        method: such as snapkv:budget=512,window=16 or snapkv+kivi4 (see `kvjax methods`).
        budget: tokens per KV head, for a method that has a budget.
        shares: a file of `kvjax calibrate budgets`: heads have budgets of their own, whose mean is `budget`.
        calibration: a folder of `kvjax calibrate a2ats`, for a method that takes one.
        thresholds: a folder of `kvjax calibrate chess`: activations below them are left out.
        int8: hold the projections as int8 codes.
        compress: when: at the prompt's "end", or after each "chunk" of it.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    method: str = "full"
    budget: int | None = None
    shares: Path | None = None
    calibration: Path | None = None
    thresholds: Path | None = None
    int8: bool = False
    compress: str = "end"

    def loaded(self) -> tuple[Model, CacheMethod]:
        """Returns both; wrong names are told before the model is loaded.

        Raises:
            ValueError: for what does not go together.
        """
        self._check()
        model = kvjax.load(self.model, self.dtype)
        check_tokenizer(model)
        given = {} if self.budget is None else {"budget": self.budget}
        if self.calibration is not None:
            given["calibration"] = codebooks.load(self.calibration, model)
        method = spec.parse(self.method, **given)
        if self.shares is not None:
            given["budget"] = budgets.load(self.shares, model).table(self.budget, least=method.least)
            method = spec.parse(self.method, **given)
        model = quantize(model) if self.int8 else model
        if self.thresholds is not None:
            model = thresholds.load(self.thresholds, model).apply(model)
        return model, method

    def _check(self) -> None:
        """Raises where settings do not go together, as far as that is known without a model."""
        free = spec.settings_of(self.method)
        if self.calibration is None and "calibration" in free:
            raise ValueError(f"{self.method} needs a calibration, got none: give --calibration FOLDER")
        if self.budget is None and self.shares is not None:
            raise ValueError(f"shares are of a budget, got {str(self.shares)!r} alone: give --budget too")
        given = {} if self.budget is None else {"budget": self.budget}
        if self.calibration is None:
            spec.parse(self.method, **given)
        elif "calibration" not in free:
            raise ValueError(
                f"{self.method} takes no calibration, got {str(self.calibration)!r}: leave --calibration out"
            )
        if given and "budget" not in free:
            raise ValueError(f"{self.method} takes no further budget, got {self.budget=}: leave --budget out")
