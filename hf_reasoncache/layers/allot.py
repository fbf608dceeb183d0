"""How many tokens of a window each head keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_reasoncache.budgets.heads import head_budgets
from hf_reasoncache.layers.window_policy import WindowPolicy
from hf_reasoncache.scorers.base import HeldTokens
from hf_reasoncache.shards import Shard

Allot = Callable[[HeldTokens, torch.Tensor, torch.Tensor], torch.Tensor]
"""From what is held, its scores `[R, H_kv, N]` and what is forced to stay (BoolTensor of the same
shape) to tokens per head, LongTensor[R, H_kv]."""


def equal(kept: torch.Tensor) -> Allot:
    """Give every head of a row the same, LongTensor[R]."""

    def allot(held: HeldTokens, scores: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
        return kept[:, None].expand(-1, scores.shape[1])

    return allot


def by_demand(policy: WindowPolicy, kept: torch.Tensor, shard: Shard) -> Allot:
    """Give heads by demand as many tokens as if every one kept `kept`, LongTensor[R].

    Only for a window that has not lost a token yet, so that all heads of a row hold the same.
    """

    def allot(held: HeldTokens, scores: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
        heads, count = scores.shape[1], held.count.amin(-1).tolist()
        floor = forced.sum(-1).amax(-1).tolist()
        scores = scores.masked_fill(forced, torch.inf).masked_fill(~held.valid, -torch.inf)
        scores = shard.gather(scores)
        split = [
            # No head can keep more than it holds.
            head_budgets(
                scores[row : row + 1],
                scores[row : row + 1] > -torch.inf,
                scores.shape[1] * each,
                floor=floor[row],
                high=max(1.0, min(2.0, count[row] / max(each, 1))),
                comparable=policy.scorer.comparable,
            )
            for row, each in enumerate(kept.tolist())
        ]
        return shard.own(torch.cat(split), heads)

    return allot
