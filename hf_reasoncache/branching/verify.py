"""RKSC's weights: verification scores, and branches that need none (arXiv 2606.09937)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_reasoncache.arguments import require_share
from hf_reasoncache.branching.vote import Branch, sqrt_confidence


@dataclass(frozen=True)
class VerificationSkip:
    """Stage 1 of RKSC's confident exit: branches that need no verification pass.

    A branch needs none if its confidence (mean top-1 probability) and gap reach the first pair of
    thresholds, or its confidence and relative gap the second one. That the gaps are between means
    is our reading.

    Attributes
    ----------
    confidence, gap : float
        First pair; the gap is the difference of the mean probabilities of the likeliest token and
        the runner-up.
    second_confidence, relative_gap : float
        Second pair; this gap is relative to the confidence.
    """

    confidence: float = 0.70
    gap: float = 0.06
    second_confidence: float = 0.63
    relative_gap: float = 0.08

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require_share(name, value)

    def __call__(self, branch: Branch) -> bool:
        """Say whether a branch may go unverified.

        Raises
        ------
        ValueError
            If its confidence was not recorded.
        """
        if branch.confidence is None or branch.runner_up is None:
            raise ValueError(
                "VerificationSkip: expected a branch with recorded confidence, got none; pass "
                "logits_processor=[exit.recorder] to generate."
            )
        gap = branch.confidence - branch.runner_up
        return (branch.confidence >= self.confidence and gap >= self.gap) or (
            branch.confidence >= self.second_confidence
            and gap >= self.relative_gap * branch.confidence
        )


class Verified:
    """Verification score times the square root of the confidence, for `vote(weight=...)`.

    A branch that `skip` lets through is not verified and counts as verified in full (score 1); the
    paper does not say what it counts, so this is ours.

    Parameters
    ----------
    verify : Callable[[Branch], float]
        Scores a branch from 0 to 1, usually by one forward of a model over the problem and the
        branch's answer.
    skip : VerificationSkip or None
        None verifies every branch.

    Attributes
    ----------
    verified, skipped : int
        Branches that were scored, and that were not.
    """

    def __init__(
        self, verify: Callable[[Branch], float], skip: VerificationSkip | None = VerificationSkip()
    ) -> None:
        self.verify, self.skip = verify, skip
        self.verified = self.skipped = 0

    def __call__(self, branch: Branch) -> float:
        """Weigh a branch."""
        if self.skip is not None and self.skip(branch):
            self.skipped += 1
            return sqrt_confidence(branch)
        self.verified += 1
        score = float(self.verify(branch))
        if not 0 <= score <= 1:
            raise ValueError(f"verify: expected a score from 0 to 1, got {score} for {branch}.")
        return score * sqrt_confidence(branch)
