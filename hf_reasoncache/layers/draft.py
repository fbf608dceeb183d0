"""What it takes to undo a forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hf_reasoncache.layers.chunk import Chunk


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
        yield from self.state["_log"].tensors()
