"""The highest scores of every head."""

from __future__ import annotations

import torch

from hf_reasoncache.budgets.ranking import kth_largest


def keep_top(scores: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
    """Mark the highest scores of every head; of equal scores the later one wins.

    Ties are common, since max-pooling copies a score to its neighbours, and an arbitrary choice
    among them would make a row depend on its batch.

    Parameters
    ----------
    scores : Tensor[R, H_kv, N]
        In order of position.
    budgets : LongTensor[R, H_kv]
        On any device.

    Returns
    -------
    BoolTensor[R, H_kv, N]
    """
    tokens = scores.shape[-1]
    if not tokens:
        return torch.zeros_like(scores, dtype=torch.bool)
    if not scores.is_cpu:
        return _sorted_top(scores, budgets.to(scores.device, non_blocking=True))
    budgets = budgets.clamp(max=tokens)
    bar = kth_largest(scores, budgets.clamp(min=1))[..., None]
    keep = scores >= bar
    if torch.equal(keep.sum(-1), budgets):
        return keep
    over, on_it = scores > bar, scores == bar
    spare = budgets[..., None] - over.sum(-1, keepdim=True)
    from_the_end = on_it.flip(-1).cumsum(-1).flip(-1)
    # Without a budget even the best score is one too many.
    return (over & (spare >= 0)) | (on_it & (from_the_end <= spare))


def _sorted_top(scores: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
    """See `keep_top`; by a stable sort, so that the host need not ask how many are equal."""
    tokens = scores.shape[-1]
    best = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(tokens, device=scores.device) < budgets[..., None]
    return torch.empty_like(chosen).scatter_(-1, tokens - 1 - best, chosen)
