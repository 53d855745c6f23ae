"""CHESS: the gate's activations become 0 by thresholds of their channels.

    u_i = E|a_up,i|                         what the gate is multiplied by, on average; older: sqrt E a_up,i²
    T   = the p-quantile of |a_gate,i|·u_i over the layer's channels and tokens
    a_gate,i <- 0 where |a_gate,i|·u_i < T,  that is below T/u_i
    then a column of W_up and a row of W_down are not read for each zero

State: a number per layer and one per channel. CHESS+ (`plus`) also leaves out the smallest inputs of q and o,
by one number per layer each; k and v stay dense, since what they lose stays in the cache. A channel whose up
is always 0 never counts, and is always left out.

Source: CHESS (arXiv 2409.01366), section 4 and its released code.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvjax.thresholds import ActivationSparsity, Site

__all__ = ["Chess"]


@dataclass(frozen=True)
class Chess(ActivationSparsity):
    """Leaves out the gate's activations that matter least to the product with up.

    Args:
        sparsity: p.
        plus: also the inputs of the query and output projections.
        statistic: u: "mean" of |up|, or "rms".
        group: see `ActivationSparsity`.
    """

    sparsity: float = 0.5
    plus: bool = False
    statistic: str = "mean"
    group: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for settings that are out of range."""
        super().__post_init__()
        if self.statistic not in self.statistics:
            raise ValueError(f"a statistic is one of {', '.join(self.statistics)}, got {self.statistic=}")

    @property
    def sites(self) -> Mapping[Site, str | None]:
        """The gate, weighed by u; with `plus` the inputs of q and o, not weighed."""
        more = {Site.Q_IN: None, Site.O_IN: None} if self.plus else {}
        return {Site.FFN_GATE: self.statistic, **more}
