"""What a cache measures of its risk, and what it does about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_reasoncache.risk.damage import Damage
from hf_reasoncache.risk.guard import Guard, Select, Weigh
from hf_reasoncache.shards import ALONE, Shard


@dataclass(frozen=True)
class Risk:
    """Settings shared by the layers of a cache.

    Attributes
    ----------
    queries : int
        Newest queries of a row that an eviction is measured with.
    guard : Guard or None
    """

    queries: int = 8
    guard: Guard | None = None

    def choose(
        self,
        select: Select,
        weigh: Weigh,
        budgets: torch.Tensor,
        least: torch.Tensor,
        most: torch.Tensor,
        shard: Shard = ALONE,
    ) -> tuple[torch.Tensor, Damage]:
        """Choose what stays, and measure it; see `Guard.choose`."""
        if self.guard is not None:
            return self.guard.choose(select, weigh, budgets, least, most, shard)
        keep = select(budgets)
        return keep, weigh([keep])[0]
