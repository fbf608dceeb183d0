"""What an audit has found: each class of instructions, each cache at each budget, all of them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from hf_reasoncache.evaluation.specs import Budget
from hf_reasoncache.evaluation.statistics import Paired, Share


@dataclass(frozen=True)
class ClassResult:
    """How one class of instructions is followed; an answer counts if it follows everywhere.

    Attributes
    ----------
    name : str
    together, alone : Share
        Beside the other instructions (all orders), and as the only one.
    against_full : Paired
        Together, with the full cache first.
    by_place : tuple of Share
        Together, by the place in the order; empty where it is never asked beside another.
    keep_rates : tuple of float
        Together, per full-attention layer: share of the instruction's tokens held, on average over
        the steps; empty with the full cache.
    """

    name: str
    together: Share
    alone: Share
    against_full: Paired
    by_place: tuple[Share, ...]
    keep_rates: tuple[float, ...]


@dataclass(frozen=True)
class CellResult:
    """One cache at one budget.

    Attributes
    ----------
    cache : str
    budget : int, float or None
        None of the full cache.
    classes : tuple of ClassResult
    correct : Share
        Of the answers themselves, instructions together, where they can be right.
    rank_correlation : float
        Spearman's, of the classes' rates with those of the full cache; NaN where undefined, as
        when the full cache follows all alike.
    leakage : tuple of float
        ROUGE-L recall of the protected text by every answer to all instructions together.
    nothing_evicted : bool
        The budget was too large: whatever equals the full cache says nothing.
    """

    cache: str
    budget: Budget | None
    classes: tuple[ClassResult, ...]
    correct: Share
    rank_correlation: float
    leakage: tuple[float, ...]
    nothing_evicted: bool

    @property
    def label(self) -> str:
        """Cache and budget."""
        return self.cache if self.budget is None else f"{self.cache} @ {self.budget}"

    @property
    def worst(self) -> ClassResult:
        """The class that is followed least, together."""
        return min(self.classes, key=lambda each: each.together.value)

    @property
    def largest_drop(self) -> ClassResult:
        """The class that loses most against the full cache."""
        return min(self.classes, key=lambda each: each.against_full.difference)

    @property
    def by_place(self) -> tuple[Share, ...]:
        """All classes together, by the place in the order."""
        longest = max(len(each.by_place) for each in self.classes)
        return tuple(
            Share(
                sum(each.by_place[n].count for each in self.classes if n < len(each.by_place)),
                sum(each.by_place[n].total for each in self.classes if n < len(each.by_place)),
            )
            for n in range(longest)
        )

    @property
    def order_effect(self) -> float:
        """Rate of the last place minus rate of the first; NaN with a single place."""
        places = self.by_place
        return places[-1].value - places[0].value if len(places) > 1 else math.nan

    @property
    def largest_leakage(self) -> float:
        """NaN without a protected text."""
        return max(self.leakage, default=math.nan)

    @property
    def mean_leakage(self) -> float:
        """NaN without a protected text."""
        return statistics.mean(self.leakage) if self.leakage else math.nan


@dataclass(frozen=True)
class Audit:
    """All cells, the full cache first.

    Attributes
    ----------
    suite : str
    cells : tuple of CellResult
    """

    suite: str
    cells: tuple[CellResult, ...]

    @property
    def full(self) -> CellResult:
        """The full cache."""
        return self.cells[0]

    def full_rate(self, name: str) -> Share:
        """How often the full cache follows a class of instructions, together."""
        return next(each.together for each in self.full.classes if each.name == name)
