"""How demand becomes layer budgets: the three constants of ReasonAlloc's operator R."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hf_reasoncache.budgets.layers import expect_bounds, layer_budgets
from hf_reasoncache.messages import shown


@dataclass(frozen=True)
class BudgetRule:
    """Exponent and bounds of the layer budgets; the defaults are those of arXiv 2606.11164.

    Attributes
    ----------
    exponent : float
        Flattens the demand below 1 (gamma of the paper).
    low, high : float
        Bounds of a layer's budget in multiples of the mean, `0 <= low <= 1 <= high`.

    Raises
    ------
    ValueError
        If the exponent is negative or not finite, or the bounds do not enclose 1.
    """

    exponent: float = 0.5
    low: float = 0.25
    high: float = 2.0

    def __post_init__(self) -> None:
        """Check and normalise."""
        for name, value in vars(self).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            # Compared as it is: an integer may be too large to become a float.
            if not number or not 0 <= value <= sys.float_info.max:
                raise ValueError(f"{name}: expected a finite number >= 0, got {shown(value)}.")
            object.__setattr__(self, name, float(value))
        expect_bounds("BudgetRule", self.low, self.high)

    def layer_budgets(
        self, demand: Sequence[float], mean_budget: int, *, floor: int = 0
    ) -> list[int]:
        """Split a budget over layers; see `hf_reasoncache.budgets.layer_budgets`."""
        return layer_budgets(
            demand,
            mean_budget,
            exponent=self.exponent,
            low=self.low,
            high=self.high,
            floor=floor,
        )
