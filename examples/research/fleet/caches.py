"""The caches that are compared, by the names that tables call them."""

from __future__ import annotations

from hf_reasoncache.evaluation.arms import FULL_ARM, Arm, Budget, parse_arm, parse_budget

FULL = "DynamicCache"


def arms(cache: str, budgets: str) -> dict[str, tuple[Arm, Budget | None]]:
    """Return the full cache, and one cache at several budgets.

    Parameters
    ----------
    cache : str
        As the command line writes it, see `hf_reasoncache.evaluation.parse_arm`.
    budgets : str
        Numbers with commas between them.

    Raises
    ------
    ValueError
        If either is not valid.
    """
    arm, name = parse_arm(cache), cache.partition(":")[0]
    if arm.is_full:
        raise ValueError(f"--cache: expected a compressed cache, got {cache!r}.")
    found: dict[str, tuple[Arm, Budget | None]] = {FULL: (FULL_ARM, None)}
    for text in filter(None, budgets.split(",")):
        found[f"{name} {text.strip()}"] = arm, parse_budget(text)
    return found
