"""Smoothing of scores along the held tokens."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F

Pooling = Literal["max", "mean"]


def pool(scores: torch.Tensor, valid: torch.Tensor, kernel: int, kind: Pooling) -> torch.Tensor:
    """Replace each score by the maximum or mean over the `kernel` tokens centred on it.

    Neighbours are neighbours among the *held* tokens. Filler and the space beyond the ends take no
    part: the mean divides by the tokens it really saw, where zero padding would push down the first
    and last ones.

    Parameters
    ----------
    scores : Tensor[R, H, N]
        Floating point; filler may hold anything.
    valid : BoolTensor[R, H, N]
        Which entries take part.
    kernel : int
        Odd width in tokens; 1 changes nothing.
    kind : {"max", "mean"}

    Returns
    -------
    Tensor[R, H, N]
        0 where `valid` is False.

    Raises
    ------
    ValueError
        If `kernel` is even or not positive, or `kind` is unknown.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"pool expects an odd kernel >= 1, got {kernel}; use the next odd width.")
    if kind == "max":
        lowest = torch.finfo(scores.dtype).min
        pooled = F.max_pool1d(scores.where(valid, lowest), kernel, 1, kernel // 2)
    elif kind == "mean":
        share = F.avg_pool1d(valid.to(scores.dtype), kernel, 1, kernel // 2)
        pooled = F.avg_pool1d(scores.where(valid, 0.0), kernel, 1, kernel // 2)
        # Both averages divide by `kernel`, which cancels; `share` is 0 only where nothing valid is
        # near.
        pooled = pooled / share.where(valid, 1.0)
    else:
        raise ValueError(f"pool expects kind in {get_args(Pooling)}, got {kind!r}.")
    return pooled.where(valid, 0.0)
