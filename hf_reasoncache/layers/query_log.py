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
        self._columns = 0

    def append(self, query: torch.Tensor) -> None:
        """Add the queries `[B, H_q, T, D]` of one forward."""
        if self.size == 0 or query.shape[2] == 0:
            return
        self.chunks.append(query)
        self._columns += query.shape[2]
        self._forget()

    def resize(self, size: int) -> None:
        """Answer for another number of columns from now on."""
        self.size = size
        self._forget()

    def _forget(self) -> None:
        while self.chunks and self._columns - self.chunks[0].shape[2] >= self.size:
            self._columns -= self.chunks.popleft().shape[2]
        if self.chunks and self.chunks[0].shape[2] > self.size:
            # Cloned: a slice would keep the queries of a whole prompt alive.
            self.chunks[0] = self.chunks[0][:, :, self._columns - self.size :].clone()
            self._columns = self.size

    def last(self) -> torch.Tensor | None:
        """Return the newest queries `[B, H_q, A <= size, D]`, oldest first, if there are any."""
        if not self.chunks:
            return None
        return torch.cat(list(self.chunks), dim=2)[:, :, -self.size :]

    def crop(self, columns: int) -> None:
        """Forget the newest `columns` columns."""
        while columns > 0 and self.chunks:
            chunk = self.chunks.pop()
            removed = min(columns, chunk.shape[2])
            if removed < chunk.shape[2]:
                self.chunks.append(chunk[:, :, :-removed])
            columns -= removed
            self._columns -= removed

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder batch rows."""
        self.chunks = deque(chunk.index_select(0, rows.to(chunk.device)) for chunk in self.chunks)

    def clone(self) -> QueryLog:
        """Return a log that changes independently; the tensors themselves are never written to."""
        twin = QueryLog(self.size)
        twin.chunks, twin._columns = deque(self.chunks), self._columns
        return twin
