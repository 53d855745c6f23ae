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
        method = self._method()
        model = kvjax.load(self.model, self.dtype)
        check_tokenizer(model)
        if self.shares is not None:
            table = budgets.load(self.shares, model).table(self.budget, least=getattr(method, "least", 1))
            method = spec.parse(self.method, budget=table)
        if self.calibration is not None:
            method = spec.parse(self.method, calibration=codebooks.load(self.calibration, model))
        model = quantize(model) if self.int8 else model
        if self.thresholds is not None:
            model = thresholds.load(self.thresholds, model).apply(model)
        return model, method

    def _method(self) -> CacheMethod | None:
        """Returns the method, with the budget where it has one; None for one that takes a calibration."""
        if self.calibration is not None:
            if "calibration" in spec.settings_of(self.method):
                return None
            raise ValueError(
                f"{self.method} takes no calibration, got {str(self.calibration)!r}: leave --calibration out"
            )
        if self.budget is None:
            if self.shares is not None:
                raise ValueError(f"shares are of a budget, got {str(self.shares)!r} alone: give --budget too")
            return spec.parse(self.method)
        method = spec.parse(self.method, budget=self.budget)
        if "budget" not in spec.settings_of(self.method):
            raise ValueError(f"{self.method} takes no further budget, got {self.budget=}: leave --budget out")
        return method
