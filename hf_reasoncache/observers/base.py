"""What watches a layer and changes nothing."""

from __future__ import annotations

from typing import Protocol

import torch

from hf_reasoncache.risk.log import RiskLog
from hf_reasoncache.shards import Shard
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.pool_store import PoolStore


class Observed(Protocol):
    """A layer, as an observer knows it; see `CacheLayer`."""

    index: int
    seen: int
    shard: Shard
    store: PoolStore


class Observer:
    """Sees the tokens of every forward of one layer; by itself it does nothing.

    Attributes
    ----------
    log : RiskLog or None
        What it reports; None reports nothing.
    nbytes : int
        Bytes that it holds.
    """

    log: RiskLog | None = None
    nbytes: int = 0

    def attended(self, layer: Observed, new: NewTokens) -> None:
        """Look at new tokens that have just been stored and attended to."""

    def hide(self, hidden: torch.Tensor) -> None:
        """Follow an attention mask: BoolTensor[B, T], True for columns that it hides."""

    def crop(self, columns: int) -> None:
        """Go back to the first `columns` columns."""

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder rows (LongTensor, CPU)."""

    def reset(self) -> None:
        """Forget everything."""

    def clone(self) -> Observer:
        """Return an observer that changes independently."""
        return self
