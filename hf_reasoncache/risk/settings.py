"""What a cache measures of its risk, and what it does about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_reasoncache.risk.damage import Damage
from hf_reasoncache.risk.guard import Choice, Guard, Scale
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
        self, plan: Choice, scale: Scale, shard: Shard = ALONE
    ) -> tuple[torch.Tensor, Damage]:
        """Choose what stays, and measure it; see `Guard.choose`."""
        if self.guard is not None:
            return self.guard.choose(plan, scale, shard)
        keep = plan.keep(plan.per_head)
        return keep, scale.measure([keep])[0]
