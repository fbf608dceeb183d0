"""Conformal bounds: what the errors of other texts say about the next one."""

from __future__ import annotations

import math
from collections.abc import Sequence


def conformal_bound(groups: Sequence[Sequence[float]], alpha: float) -> float:
    """Return a number that a later probe exceeds with probability `alpha` at most.

    Probes of one text are alike, so they do not count as so many observations: every text weighs
    the same, and one more text, of which nothing is known, counts as infinite. That is hierarchical
    conformal prediction (arXiv 2306.06342); with one probe per text it is split conformal. It
    holds for a probe of a new text, on average over the texts, if that text comes from where the
    others came from; it says nothing about texts of another kind.

    Parameters
    ----------
    groups : sequence of sequence of float
        Errors of the probes of each text (`RiskLog.error`); texts without any are left out.
    alpha : float
        In (0, 1).

    Returns
    -------
    float
        Infinite with fewer than `1 / alpha - 1` texts.

    Raises
    ------
    ValueError
        If `alpha` is out of range, an error is not a number, or there are none.
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"conformal_bound: expected alpha in (0, 1), got {alpha!r}.")
    groups = [list(group) for group in groups if len(group)]
    if not groups or any(math.isnan(value) for group in groups for value in group):
        raise ValueError("conformal_bound: expected errors, numbers, of at least one text.")
    weighted = sorted((value, 1.0 / len(group)) for group in groups for value in group)
    # In units of a text, of which there is one more than was seen.
    needed = (1.0 - alpha) * (len(groups) + 1)
    reached = 0.0
    for value, weight in weighted:
        reached += weight
        if reached >= needed - 1e-9:
            return value
    return math.inf


def coverage(groups: Sequence[Sequence[float]], bound: float) -> list[float]:
    """Share of each text's probes that a bound covers."""
    return [sum(value <= bound for value in group) / len(group) for group in groups if len(group)]
