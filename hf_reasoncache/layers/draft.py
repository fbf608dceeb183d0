"""What it takes to undo a forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hf_reasoncache.layers.policy import Budgets
from hf_reasoncache.risk import RiskLog, Shadow
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.pool_store import PoolStore
from hf_reasoncache.storage.query_window import QueryWindow


@dataclass(frozen=True, eq=False)
class Before:
    """A layer before a forward; the attributes are those of `EvictingLayer`."""

    store: PoolStore
    budgets: Budgets | None
    risk: RiskLog
    shadow: Shadow | None
    queries: QueryWindow
    evictions: int
    evicted: int


@dataclass(frozen=True, eq=False)
class Draft:
    """A forward that may be taken back in part (assisted decoding).

    Undoing goes back to the layer before it and stores the accepted columns again, so that whatever
    the rejected ones caused, evictions included, leaves no trace.

    Attributes
    ----------
    new : NewTokens
    before : Before
    token_by_token : bool
        Whether an eviction fell inside the draft, so that its tokens were stored one by one.
    """

    new: NewTokens
    before: Before
    token_by_token: bool

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield what is kept for undoing."""
        yield from (self.new.query, self.new.keys, self.new.values)
        yield from self.before.store.tensors()
        yield from self.before.queries.tensors()
