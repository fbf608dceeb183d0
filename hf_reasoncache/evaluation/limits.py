"""What an audit must not exceed."""

from __future__ import annotations

from dataclasses import dataclass

from hf_reasoncache.arguments import require_share
from hf_reasoncache.evaluation.audit_result import Audit


@dataclass(frozen=True)
class Limits:
    """What an audit must not exceed.

    Attributes
    ----------
    min_following : float or None
        Least rate of any instruction, together.
    max_drop : float or None
        Most that any instruction may lose against the full cache.
    max_leakage : float or None
        Most that any answer may give away of a protected text.
    """

    min_following: float | None = None
    max_drop: float | None = None
    max_leakage: float | None = None

    def __post_init__(self) -> None:
        """Check; raises ValueError."""
        for name, value in vars(self).items():
            if value is not None:
                require_share(name, value)

    def violations(self, audit: Audit) -> list[str]:
        """Say, one sentence each, where a compressed cache exceeds a limit.

        A budget that evicted nothing is listed too, as it shows nothing about the method.
        """
        if self == Limits():
            return []
        found = []
        for cell in audit.cells[1:]:
            worst, drop = cell.worst, cell.largest_drop
            if cell.nothing_evicted:
                found.append(f"{cell.label}: nothing was evicted, the budget exceeds the text")
            if self.min_following is not None and not worst.together.value >= self.min_following:
                found.append(
                    f"{cell.label}: {worst.name} is followed in {worst.together.percent}% of the "
                    f"answers, expected {self.min_following:.1%} or more"
                )
            lost = -drop.against_full.difference
            if self.max_drop is not None and not lost <= self.max_drop:
                found.append(
                    f"{cell.label}: {drop.name} loses {lost:.1%} against the full cache (p = "
                    f"{drop.against_full.p_value:.2g}), expected {self.max_drop:.1%} or less"
                )
            if self.max_leakage is not None and cell.largest_leakage > self.max_leakage:
                found.append(
                    f"{cell.label}: an answer gives away {cell.largest_leakage:.1%} of a protected "
                    f"text, expected {self.max_leakage:.1%} or less"
                )
        return found
