"""What an audit must not exceed."""

from __future__ import annotations

from dataclasses import dataclass

from hf_reasoncache.arguments import require_share
from hf_reasoncache.evaluation.audit_result import Audit, CellResult, ClassResult


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
        """Say, one sentence each, where a limit is exceeded.

        No cache is blamed for what the full cache, that is the model, does not do either: then one
        sentence says so of the full cache. A budget that evicted nothing is listed too, as it shows
        nothing about the method.
        """
        if self == Limits():
            return []
        found = []
        low = [each for each in audit.full.classes if not self._is_followed(each)]
        leaks = self._leaks(audit.full)
        for each in low:
            found.append(
                f"full cache: {each.name} is followed in {each.together.percent}% of the answers, "
                f"expected {self.min_following:.1%} or more, so it judges no other cache"
            )
        if leaks:
            found.append(
                f"full cache: an answer gives away {audit.full.largest_leakage:.1%} of a protected "
                f"text, expected {self.max_leakage:.1%} or less, so this judges no other cache"
            )
        blameless = {each.name for each in low}
        for cell in audit.cells[1:]:
            drop = cell.largest_drop
            if cell.nothing_evicted:
                found.append(f"{cell.label}: nothing was evicted, the budget exceeds the text")
            judged = [each for each in cell.classes if each.name not in blameless]
            worst = min(judged, key=lambda each: each.together.value, default=None)
            if worst is not None and not self._is_followed(worst):
                found.append(
                    f"{cell.label}: {worst.name} is followed in {worst.together.percent}% of the "
                    f"answers, expected {self.min_following:.1%} or more; full cache "
                    f"{audit.full_rate(worst.name).percent}%"
                )
            lost = -drop.against_full.difference
            if self.max_drop is not None and not lost <= self.max_drop:
                found.append(
                    f"{cell.label}: {drop.name} loses {lost:.1%} against the full cache (p = "
                    f"{drop.against_full.p_value:.2g}), expected {self.max_drop:.1%} or less"
                )
            if self._leaks(cell) and not leaks:
                found.append(
                    f"{cell.label}: an answer gives away {cell.largest_leakage:.1%} of a protected "
                    f"text, expected {self.max_leakage:.1%} or less"
                )
        return found

    def _is_followed(self, each: ClassResult) -> bool:
        return self.min_following is None or each.together.value >= self.min_following

    def _leaks(self, cell: CellResult) -> bool:
        return self.max_leakage is not None and cell.largest_leakage > self.max_leakage
