"""CATS: the gate's activations below one threshold per layer become 0.

    a_gate <- 0 where |act(x W_gate)| < t,  t = the p-quantile of |a_gate| over channels and tokens
    then a column of W_up and a row of W_down are not read for each zero

State: a number per layer. The attention is dense.

Source: CATS (arXiv 2404.08763), section 3, without its kernels' details.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvjax.thresholds import ActivationSparsity, Site

__all__ = ["Cats"]


@dataclass(frozen=True)
class Cats(ActivationSparsity):
    """Leaves out the gate's smallest activations."""

    sparsity: float = 0.5
    group: int = 1

    @property
    def sites(self) -> Mapping[Site, str | None]:
        """The gate."""
        return {Site.FFN_GATE: None}
