"""The caches that are compared, by the names that tables call them."""

from __future__ import annotations

from hf_reasoncache.evaluation.specs import FULL, Budget, CacheSpec, parse_budget, parse_spec

DYNAMIC = "DynamicCache"


def specs(cache: str, budgets: str) -> dict[str, tuple[CacheSpec, Budget | None]]:
    """Return the full cache, and one cache at several budgets.

    Parameters
    ----------
    cache : str
        As the command line writes it, see `hf_reasoncache.evaluation.parse_spec`.
    budgets : str
        Numbers with commas between them.

    Raises
    ------
    ValueError
        If either is not valid.
    """
    spec, name = parse_spec(cache), cache.partition(":")[0]
    if spec.is_full:
        raise ValueError(f"--cache: expected a compressed cache, got {cache!r}.")
    found: dict[str, tuple[CacheSpec, Budget | None]] = {DYNAMIC: (FULL, None)}
    for text in filter(None, budgets.split(",")):
        found[f"{name} {text.strip()}"] = spec, parse_budget(text)
    return found
