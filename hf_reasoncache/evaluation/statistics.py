"""The statistics of the tables: intervals, paired tests, rank correlation.

All but `Estimate` needs scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Share:
    """A proportion with its uncertainty.

    Attributes
    ----------
    count, total : int
    """

    count: int
    total: int

    @staticmethod
    def of(marks: Sequence[bool]) -> Share:
        """Return the share of what is true."""
        return Share(sum(marks), len(marks))

    @property
    def value(self) -> float:
        """The share; NaN if the total is 0."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval; NaN if the total is 0."""
        if not self.total:
            return math.nan, math.nan
        test = _stats().binomtest(self.count, self.total)
        interval = test.proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)

    def __str__(self) -> str:
        """Render as ``0.975 [0.943, 0.989]``."""
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"

    @property
    def percent(self) -> str:
        """Render as ``97.5 (94.3-98.9)``; a dash if the total is 0."""
        if not self.total:
            return "-"
        low, high = self.interval
        return f"{100 * self.value:.1f} ({100 * low:.1f}-{100 * high:.1f})"


@dataclass(frozen=True)
class Paired:
    """Two caches on the same questions.

    Attributes
    ----------
    lost, gained : int
        Questions that only the first, or only the second cache got right.
    total : int
        Questions that both answered.
    """

    lost: int
    gained: int
    total: int

    @staticmethod
    def of(first: Sequence[bool], second: Sequence[bool]) -> Paired:
        """Count where two caches differ.

        Raises
        ------
        ValueError
            If they have not the same number of questions.
        """
        if len(first) != len(second):
            raise ValueError(
                f"Paired: expected both caches on the same questions, got {len(first)} and "
                f"{len(second)} answers."
            )
        pairs = list(zip(first, second, strict=True))
        return Paired(
            lost=sum(a and not b for a, b in pairs),
            gained=sum(b and not a for a, b in pairs),
            total=len(pairs),
        )

    @property
    def difference(self) -> float:
        """Share of the second minus share of the first; NaN if the total is 0."""
        return (self.gained - self.lost) / self.total if self.total else math.nan

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided: how likely so one-sided a difference is by chance."""
        if not self.lost + self.gained:
            return 1.0
        return float(_stats().binomtest(self.gained, self.lost + self.gained, 0.5).pvalue)


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens with its 95% interval.

    Attributes
    ----------
    value, low, high : float
    """

    value: float
    low: float
    high: float

    @staticmethod
    def of_blocks(sums: Sequence[float], sizes: Sequence[int]) -> Estimate:
        """Return the mean over the tokens of all blocks; the interval resamples whole blocks.

        Neighbouring tokens are not independent, blocks nearly are.

        Parameters
        ----------
        sums : sequence of float
            Sum over the tokens of each block.
        sizes : sequence of int
            How many tokens those are.
        """
        blocks, tokens = torch.tensor([list(sums), list(sizes)], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(blocks), (5000, len(blocks)), generator=generator)
        means = blocks[drawn].sum(-1) / tokens[drawn].sum(-1)
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Estimate(float(blocks.sum() / tokens.sum()), low, high)

    def exp(self) -> Estimate:
        """Return the estimate of a perplexity from that of a loss in nats."""
        return Estimate(math.exp(self.value), math.exp(self.low), math.exp(self.high))

    def __str__(self) -> str:
        """Render a difference as ``+0.116 (+0.078, +0.163)``."""
        return f"{self.value:+.3f} ({self.low:+.3f}, {self.high:+.3f})"


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where it has none (fewer than 3 values, or all equal)."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return math.nan
    return float(_stats().spearmanr(first, second).statistic)


def _stats() -> Any:
    try:
        import scipy.stats
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "evaluation: expected scipy for intervals and tests, got no such module; pip install "
            "'hf-reasoncache[eval]'.",
            name="scipy",
        ) from error
    return scipy.stats
