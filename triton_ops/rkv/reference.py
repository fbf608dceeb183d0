"""The formula of R-KV in plain PyTorch: its definition, and the CPU path."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..redundancy.places import GONE, NONE, UNSEEN

# Entries per token of a table that says where a position is held.
_ENTRIES = 4


def find_repeats_reference(state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """See `triton_ops.rkv.find_repeats`.

    By a table of positions modulo its size, which is faster than a binary search on a CPU. Of two
    tokens that share an entry one is not found, and is `GONE` for those that name it.
    """
    count = positions.shape[-1]
    last = (_ENTRIES << (count - 1).bit_length()) - 1
    # One more entry, for filler.
    table = state.new_zeros(*state.shape[:-1], last + 2)
    order = torch.arange(count, dtype=table.dtype, device=table.device)
    entry = (positions & last).masked_fill_(positions < 0, last + 1)
    table.scatter_(-1, entry, order.expand_as(state))
    wanted = state.long() - 2
    place = table.gather(-1, wanted & last).long()
    found = positions.gather(-1, place) == wanted
    place = place.where(found, GONE).masked_fill_(state == 1, NONE)
    return place.masked_fill_(state == 0, UNSEEN)


def rkv_scores_reference(
    importance: torch.Tensor,
    repeated: torch.Tensor,
    repeat: torch.Tensor,
    positions: torch.Tensor,
    *,
    lam: float,
    kernel: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `triton_ops.rkv.rkv_scores`."""
    filler = positions < 0
    state = (positions.gather(-1, repeat.clamp(min=0)) + 2).where(repeat != NONE, 1)
    softmax = repeated.masked_fill(filler, torch.finfo(repeated.dtype).min).softmax(-1)
    lowest = torch.finfo(importance.dtype).min
    pooled = F.max_pool1d(importance.masked_fill(filler, lowest), kernel, 1, kernel // 2)
    scores = (lam * pooled - (1.0 - lam) * softmax).float()
    return scores.masked_fill_(filler, 0.0), state.masked_fill_(filler, 0).int()
