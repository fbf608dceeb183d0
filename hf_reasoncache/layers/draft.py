"""The tokens of one forward, and what it takes to undo it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Chunk:
    """New tokens of one layer.

    Attributes
    ----------
    query : Tensor[B, H_q, T, D]
    keys, values : Tensor[B, H_kv, T, D], Tensor[B, H_kv, T, D_v]
    valid : BoolTensor[B, T] or None
        False for padding; None when nothing is padded.
    settings : dict
        `scaling`, `softcap`, `s_aux` of the attention.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor | None
    settings: dict[str, Any]

    @property
    def steps(self) -> int:
        """Number of columns."""
        return self.query.shape[2]

    def columns(self, first: int, last: int) -> Chunk:
        """Return the chunk's own columns `first` to `last - 1`."""
        return replace(
            self,
            query=self.query[:, :, first:last],
            keys=self.keys[:, :, first:last],
            values=self.values[:, :, first:last],
            valid=None if self.valid is None else self.valid[:, first:last],
        )


@dataclass(frozen=True, eq=False)
class Draft:
    """A forward that may be taken back in part (assisted decoding).

    Undoing puts `state` back and stores the accepted columns again, so that whatever the rejected
    ones caused, evictions included, leaves no trace.

    Attributes
    ----------
    chunk : Chunk
    state : dict
        The layer's attributes before the forward.
    token_by_token : bool
        Whether an eviction fell inside the chunk, so that its tokens were stored one by one.
    """

    chunk: Chunk
    state: dict[str, Any]
    token_by_token: bool

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield what is kept for undoing."""
        yield from (self.chunk.query, self.chunk.keys, self.chunk.values)
        yield from self.state["pool"].fields.values()
        yield from self.state["_log"].chunks
