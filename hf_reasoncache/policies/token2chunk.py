"""Token2Chunk: kept tokens that form contiguous text."""

from __future__ import annotations

import torch

from hf_reasoncache.policies.keep_top import keep_top


def token2chunk(
    scores: torch.Tensor,
    valid: torch.Tensor,
    budgets: torch.Tensor,
    share: float,
    forced: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mark the best tokens of every head, and join them to chunks by filling gaps between them.

    From Kara (arXiv 2607.01237): selected tokens are the endpoints of chunks of variable length, so
    that what is kept reads as text. How they are expanded is not published; ours: of a head's
    budget, `share` (rounded down, but never all) is set aside. The best tokens take the rest. What
    was set aside fills the gaps between kept neighbours, the shortest gap first, of equally short
    ones the one with the higher mean score, then the earlier one. The last gap may be filled in
    part, from its beginning. When no gap is left, the chunk grows past its last token, then before
    its first.

    Parameters
    ----------
    scores : Tensor[R, H, N]
        In order of position; finite where `valid`.
    valid : BoolTensor[R, H, N]
        False for filler, which is behind all tokens of its head.
    budgets : LongTensor[R, H]
        Tokens to mark, on any device.
    share : float
        In [0, 1]; 0 marks the best tokens only.
    forced : BoolTensor[R, H, N], optional
        Tokens to mark whatever their score, inside the budget; gaps beside them are gaps too. They
        may not be more than the budget.

    Returns
    -------
    BoolTensor[R, H, N]
        As many marks as the budget says, or all tokens of a head that has fewer.
    """
    budgets, ranks = (
        budgets.to(scores.device, non_blocking=True),
        scores.masked_fill(~valid, -torch.inf),
    )
    free = budgets
    if forced is not None:
        ranks, free = ranks.masked_fill(forced, torch.inf), budgets - forced.sum(-1)
    best = budgets - free + (free - (free * share).long()).clamp_min(free.clamp_max(1))
    keep = keep_top(ranks, best) & valid
    if share == 0:
        return keep
    rest = torch.minimum(budgets, valid.sum(-1)) - keep.sum(-1)
    return keep | (_filling_order(scores.where(valid, 0), valid, keep) < rest[..., None])


def _filling_order(scores: torch.Tensor, valid: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Rank of each token among those that may be filled in; others come last."""
    places = scores.shape[-1]
    place = torch.arange(places, device=scores.device).expand_as(keep)
    # Kept neighbours: -1 and `places` where there is none.
    before = place.where(keep, -1).cummax(-1).values
    after = place.where(keep, places).flip(-1).cummin(-1).values.flip(-1)
    length = after - before - 1
    total = torch.nn.functional.pad(scores.double().cumsum(-1), (1, 0))
    mean = (total.gather(-1, after) - total.gather(-1, before + 1)) / length.clamp_min(1)
    behind, ahead = after == places, before < 0
    # Before the first kept token, the chunk grows backwards.
    order = place.where(~ahead, places - place).argsort(dim=-1, stable=True)
    # A stable sort by each rule, the least important one first.
    last = places + 1
    for rule in (
        before,
        -mean,
        length.masked_fill(behind, last).masked_fill(ahead, last + 1),
        (~valid | keep).to(torch.uint8),
    ):
        order = order.gather(-1, rule.gather(-1, order).argsort(dim=-1, stable=True))
    return torch.empty_like(order).scatter_(-1, order, place)
