"""How large an error rate may be, given how many errors were seen."""

from __future__ import annotations

import math


def upper_bound(errors: int, trials: int, confidence: float) -> float:
    """Exact one-sided upper bound of a binomial rate (Clopper and Pearson, 1934).

    Parameters
    ----------
    errors, trials : int
    confidence : float
        Probability, over repetitions, that the bound is not below the true rate.

    Returns
    -------
    float
        The rate at which `errors` or fewer have probability `1 - confidence`; 1 without trials.
    """
    if not 0 <= errors <= trials:
        raise ValueError(f"errors: expected 0 to {trials}, got {errors}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}.")
    if errors == trials:
        return 1.0
    low, high = 0.0, 1.0
    # 60 halvings are beyond the precision of a float.
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(errors, trials, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most(errors: int, trials: int, rate: float) -> float:
    """Probability of at most that many errors, for a rate between 0 and 1."""
    logs = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(rate)
        + (trials - k) * math.log1p(-rate)
        for k in range(errors + 1)
    )
    return math.fsum(math.exp(value) for value in logs)
