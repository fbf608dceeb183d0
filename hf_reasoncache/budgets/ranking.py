"""What comes first, and what just makes it into a budget.

On a CPU by NumPy, which takes a third of torch's time to select and a quarter to sort.
"""

from __future__ import annotations

import numpy as np
import torch


def kth_largest(scores: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Return one order statistic of each row.

    Selection, 10 times cheaper than sorting, takes one rank per call; rows nearly always share it.

    Parameters
    ----------
    scores : Tensor[..., N]
        `N > 0`.
    rank : LongTensor[...]
        From 1, the largest, to `N`; on the CPU.

    Returns
    -------
    Tensor[...]
    """
    flat, wanted = scores.flatten(0, -2), rank.flatten()
    ranks = wanted.unique().tolist()
    if len(ranks) == 1:
        found = _kth_smallest(flat, flat.shape[1] - ranks[0])
    else:
        found = flat.new_empty(len(flat))
        for shared in ranks:
            some = (wanted == shared).to(flat.device)
            found[some] = _kth_smallest(flat[some], flat.shape[1] - shared)
    return found.view(rank.shape)


def _kth_smallest(scores: torch.Tensor, index: int) -> torch.Tensor:
    """What stands in place `index`, from 0, of each row `[S, N]` once it is sorted."""
    if scores.device.type != "cpu":
        return scores.kthvalue(index + 1, dim=-1).values
    # NumPy has no bfloat16.
    known = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).numpy()
    return torch.from_numpy(np.partition(known, index, axis=-1)[:, index]).to(scores.dtype)
