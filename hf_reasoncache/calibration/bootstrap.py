"""How sure a mean over prompts is."""

from __future__ import annotations

import torch

_RESAMPLES = 10_000


def mean_interval(
    values: torch.Tensor, *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Parameters
    ----------
    values : Tensor[N]
        One independent value per prompt; paired differences for a comparison.
    confidence : float
    seed : int

    Returns
    -------
    low, high : float
    """
    draws = torch.randint(
        len(values), (_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(seed)
    )
    means = values.double()[draws].mean(-1)
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
