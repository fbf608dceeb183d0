"""What the branches of a problem decide together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum


class Reason(str, Enum):
    """Why a branch stopped."""

    END = "ended"
    """It wrote an end-of-sequence token."""
    CONFIDENT = "confident"
    """It had an answer and was sure (`DecodeExit`)."""
    WEAK = "weak"
    """A group of its tokens was unsure (`WeakExit`); it does not vote."""
    CONSENSUS = "consensus"
    """The others had settled the vote (`ConsensusExit`)."""
    LENGTH = "length"
    """Generation ended first."""


@dataclass(frozen=True)
class Branch:
    """One branch, when it had stopped.

    Attributes
    ----------
    answer : str or None
        None if it has no answer, or no vote.
    reason : Reason
    tokens : int
        Tokens generated, the end-of-sequence token included.
    confidence, runner_up : float or None
        Means over the branch of `Confidence.top1` and `Confidence.top2`; None if not recorded.
    group_confidence : float or None
        Lowest group confidence, in nats (DeepConf); that of all tokens if they are fewer than a
        group.
    """

    answer: str | None
    reason: Reason
    tokens: int
    confidence: float | None = None
    runner_up: float | None = None
    group_confidence: float | None = None


@dataclass(frozen=True)
class VoteResult:
    """The decision of one problem's branches.

    Attributes
    ----------
    answer : str or None
        The answer of most weight; of equals, that of the earliest branch. None if nobody voted.
    weights : dict[str, float]
        Sum of the weights of each answer, heaviest first.
    branches : tuple of Branch
        In the order of the rows.
    """

    answer: str | None
    weights: dict[str, float]
    branches: tuple[Branch, ...]

    @property
    def tokens(self) -> int:
        """Tokens spent by all branches."""
        return sum(branch.tokens for branch in self.branches)

    @property
    def stopped(self) -> int:
        """Branches that a rule stopped before they ended."""
        return sum(
            branch.reason in (Reason.CONFIDENT, Reason.WEAK, Reason.CONSENSUS)
            for branch in self.branches
        )

    def __str__(self) -> str:
        reasons = Counter(branch.reason for branch in self.branches)
        why = ", ".join(f"{reasons[reason]} {reason.value}" for reason in Reason if reasons[reason])
        shares = ", ".join(f"{answer}: {weight:.3g}" for answer, weight in self.weights.items())
        return f"answer {self.answer} ({shares or 'no votes'}); {self.tokens} tokens; {why}"


Weight = Callable[[Branch], float]
"""What a branch's vote counts; at least 0."""


def majority(branch: Branch) -> float:
    """One branch, one vote (self-consistency, arXiv 2203.11171)."""
    return 1.0


def sqrt_confidence(branch: Branch) -> float:
    """Square root of the mean top-1 probability: RKSC's weight without a verification score."""
    return math.sqrt(_recorded(branch.confidence))


def group_confidence(branch: Branch) -> float:
    """Lowest group confidence, as in DeepConf's weighted vote."""
    return _recorded(branch.group_confidence)


def _recorded(value: float | None) -> float:
    if value is None:
        raise ValueError(
            "weight: expected branches with recorded confidence, got none; pass "
            "logits_processor=[exit.recorder] to generate."
        )
    return value


def vote(branches: Sequence[Branch], weight: Weight = majority) -> VoteResult:
    """Add up the branches' answers.

    Parameters
    ----------
    branches : sequence of Branch
    weight : Callable[[Branch], float]
        `majority`, `sqrt_confidence`, `group_confidence`, a `Verified`, or your own; asked only
        for branches with an answer.

    Raises
    ------
    ValueError
        If a weight is negative or not a number, or needs confidence that was not recorded.
    """
    weights: dict[str, float] = {}
    for branch in branches:
        if branch.answer is None:
            continue
        counts = float(weight(branch))
        if not counts >= 0:
            raise ValueError(f"weight: expected a number >= 0, got {counts} for {branch}.")
        weights[branch.answer] = weights.get(branch.answer, 0.0) + counts
    ranking = dict(sorted(weights.items(), key=lambda item: -item[1]))
    return VoteResult(next(iter(ranking), None), ranking, tuple(branches))
