"""TEAL: what each projection is given becomes 0 below one threshold per layer and projection.

    x <- 0 where |x| < t,  t = the p-quantile of |x| over channels and tokens;  of all seven projections
    then a row of W is not read for each zero

State: seven numbers per layer. The released code starts from the second half of a prompt and finds the
sparsity of each projection greedily; here prompts are sparse from their first token on, and what the
projections share is either equal or learnt (`kvjax.calibrate.refine_thresholds`).

Source: TEAL (arXiv 2408.14690), section 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvjax.thresholds import ActivationSparsity, Site

__all__ = ["Teal"]


@dataclass(frozen=True)
class Teal(ActivationSparsity):
    """Leaves out the smallest inputs of every projection."""

    sparsity: float = 0.5
    group: int = 1

    @property
    def sites(self) -> Mapping[Site, str | None]:
        """The inputs of all projections."""
        return {site: None for site in Site if site is not Site.FFN_GATE}
