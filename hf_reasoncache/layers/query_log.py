"""The last queries of a layer, kept by reference until an eviction asks for them."""

from __future__ import annotations

from collections import deque

import torch


class QueryLog:
    """Post-RoPE queries of the newest columns.

    Keeping the tensors that the model made anyway costs nothing per step; they are joined once per
    eviction.

    Parameters
    ----------
    size : int
        Columns to answer for; 0 keeps nothing.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.chunks: deque[torch.Tensor] = deque()

    def append(self, query: torch.Tensor) -> None:
        """Add the queries `[B, H_q, T, D]` of one forward."""
        if self.size == 0 or query.shape[2] == 0:
            return
        if query.shape[2] > self.size:
            # Cloned: a slice would keep the queries of a whole prompt alive.
            query = query[:, :, -self.size :].clone()
        self.chunks.append(query)
        columns = sum(chunk.shape[2] for chunk in self.chunks)
        while columns - self.chunks[0].shape[2] >= self.size:
            columns -= self.chunks.popleft().shape[2]

    def last(self) -> torch.Tensor | None:
        """Return the newest queries `[B, H_q, A <= size, D]`, oldest first, if there are any."""
        if not self.chunks:
            return None
        return torch.cat(list(self.chunks), dim=2)[:, :, -self.size :]

    def crop(self, columns: int) -> None:
        """Forget the newest `columns` columns."""
        while columns > 0 and self.chunks:
            chunk = self.chunks.pop()
            if chunk.shape[2] > columns:
                self.chunks.append(chunk[:, :, :-columns])
            columns -= chunk.shape[2]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder batch rows."""
        self.chunks = deque(chunk.index_select(0, rows.to(chunk.device)) for chunk in self.chunks)

    def clone(self) -> QueryLog:
        """Return a log that changes independently; the tensors themselves are never written to."""
        twin = QueryLog(self.size)
        twin.chunks = deque(self.chunks)
        return twin
