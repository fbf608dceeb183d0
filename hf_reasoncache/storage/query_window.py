"""The last queries of a layer, kept until an eviction asks for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from triton_ops.launch import send

_FEW = 32
"""Columns up to which to copy those of all rows is cheaper than to choose rows chunk by chunk."""


class QueryWindow:
    """Post-RoPE queries of the newest columns.

    By default the log keeps the tensors that the model made anyway, which costs nothing per step,
    and joins them once per eviction. As a ring it has one tensor of its own, which a captured step
    needs: there, the model makes them in the same place every time. Whoever stores the keys of a
    token writes its queries to the ring, in the same launch.

    Parameters
    ----------
    size : int
        Columns to answer for; 0 keeps nothing.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._chunks: deque[torch.Tensor] = deque()
        self._columns = 0  # in the chunks
        # The ring holds `_held` columns before `_end`.
        self._ring: torch.Tensor | None = None
        self._end = self._held = 0

    @property
    def columns(self) -> int:
        """Columns kept, of which the newest `size` are ever returned."""
        return self._held if self._ring is not None else self._columns

    @property
    def ring(self) -> torch.Tensor | None:
        """Tensor[B, H_q, size, D]: column `c` stands at place `c % size`; None unless a ring."""
        return self._ring

    def append(self, query: torch.Tensor) -> None:
        """Add the queries `[B, H_q, T, D]` of one forward; a ring ends."""
        q_len = query.size(2)
        if self.size == 0 or q_len == 0:
            return
        self._end_ring()
        self._chunks.append(query)
        self._columns += q_len
        self._forget()

    def clear(self) -> None:
        """Forget all columns; those that come next are the first."""
        self._ring = None
        self._chunks.clear()
        self._columns = 0

    def resize(self, size: int) -> None:
        """Answer for another number of columns from now on."""
        if size != self.size:
            self._end_ring()
            self.size = size
            self._forget()

    def _forget(self) -> None:
        """Let go of the chunks that are too old."""
        while self._chunks and self._columns - self._chunks[0].size(2) >= self.size:
            self._columns -= self._chunks.popleft().size(2)
        if self._chunks and self._chunks[0].size(2) > self.size:
            # Cloned: a slice would keep the queries of a whole prompt alive.
            self._chunks[0] = self._chunks[0][:, :, self._columns - self.size :].clone()
            self._columns = self.size

    def last(self, rows: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the newest queries `[R, H_q, A <= size, D]`, oldest first, if there are any.

        Parameters
        ----------
        rows : LongTensor[R], optional
            Batch rows to return, on the CPU; all by default.
        """
        if self._ring is not None:
            columns = torch.arange(self._end - self._held, self._end, device=self._ring.device)
            ring = self._ring if rows is None else self._ring[send(rows, self._ring.device)]
            return ring.index_select(2, columns % self.size)
        if not self._chunks:
            return None
        chunks = list(self._chunks)
        if rows is None or torch.equal(rows, torch.arange(chunks[0].shape[0], device="cpu")):
            return torch.cat(chunks, dim=2)[:, :, -self.size :]
        rows = send(rows, chunks[0].device)
        if self.size <= _FEW:
            return torch.cat(chunks, dim=2)[:, :, -self.size :].index_select(0, rows)
        return torch.cat([chunk.index_select(0, rows) for chunk in chunks], 2)[:, :, -self.size :]

    def make_ring(self, end: int) -> None:
        """Go on as a ring, `end` columns having been seen."""
        held = None if self._ring is not None else self.last()
        if held is None:
            return
        batch, heads, self._held, size = held.shape
        self._end = end
        columns = torch.arange(end - self._held, end, device=held.device)
        self.clear()
        with torch.inference_mode(False):
            self._ring = held.new_zeros(batch, heads, self.size, size)
            self._ring.index_copy_(2, columns % self.size, held)

    def count_appended(self) -> None:
        """Count a column that has been written into the ring."""
        if self._ring is not None:
            self._end, self._held = self._end + 1, min(self._held + 1, self.size)

    def _end_ring(self) -> None:
        if self._ring is not None:
            held, self._ring = self.last(), None
            self._chunks = deque([] if held is None else [held])
            self._columns = self._held

    def crop(self, columns: int) -> None:
        """Forget the newest `columns` columns."""
        self._end_ring()
        while columns > 0 and self._chunks:
            chunk = self._chunks.pop()
            removed = min(columns, chunk.shape[2])
            if removed < chunk.shape[2]:
                self._chunks.append(chunk[:, :, :-removed])
            self._columns -= removed
            columns -= removed

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder batch rows."""
        self._end_ring()
        self._chunks = deque(
            chunk.index_select(0, send(rows, chunk.device)) for chunk in self._chunks
        )

    def clone(self) -> QueryWindow:
        """Return a log that changes independently; kept tensors are never written to."""
        copied = QueryWindow(self.size)
        held = self.last() if self._ring is not None else None
        copied._chunks = deque(self._chunks if held is None else [held])
        copied._columns = self._columns if held is None else self._held
        return copied

    def single_columns(self, wanted: int) -> list[torch.Tensor] | None:
        """Return the newest columns, `[B, H_q, 1, D]` each; None if they are kept otherwise."""
        if self._ring is not None or any(chunk.size(2) != 1 for chunk in self._chunks):
            return None
        return list(self._chunks)[-min(wanted, self.size) :]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield what is kept."""
        yield from self._chunks
        if self._ring is not None:
            yield self._ring


def last_of_several(
    windows: Sequence[QueryWindow], rows: torch.Tensor, wanted: int
) -> torch.Tensor | None:
    """Join the last `wanted` queries of several layers, in few operations.

    Parameters
    ----------
    windows : sequence of QueryWindow
        Of layers that have seen the same forwards, of the same size.
    rows : LongTensor[R]
        On the CPU.
    wanted : int
        Columns at most; None is returned for 0.

    Returns
    -------
    Tensor[L * R, H_q, A <= wanted, D] or None
        Contiguous.
    """
    if not wanted:
        return None
    kept = [window.single_columns(wanted) for window in windows]
    columns = [each for each in kept if each]
    if len(columns) < len(windows) or len({len(each) for each in columns}) > 1:
        found = [window.last(rows) for window in windows]
        some = [each for each in found if each is not None]
        return torch.cat(some)[:, :, -wanted:] if len(some) == len(found) else None
    joined = torch.cat([chunk for age in zip(*columns, strict=True) for chunk in age])
    batch, heads, _, size = columns[0][0].shape
    joined = joined.view(len(columns[0]), len(windows), batch, heads, size)
    if not torch.equal(rows, torch.arange(batch, device="cpu")):
        joined = joined.index_select(2, send(rows, joined.device))
    return joined.permute(1, 2, 3, 0, 4).flatten(0, 1).contiguous()
