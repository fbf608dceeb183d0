"""Layers whose rows share what they have in common: the prompt, and the text before a fork.

What is shared lies in segments, a row's own text in the pool of the layer that `Branching` is mixed
into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from hf_reasoncache.layers.chunk import Chunk
from hf_reasoncache.layers.dense import add_trunk
from hf_reasoncache.layers.pool import RaggedPool
from hf_reasoncache.layers.pooled import PooledLayer, distinct_bytes
from hf_reasoncache.layers.segments import Path, Segment
from hf_reasoncache.layers.trunk import Trunk
from hf_reasoncache.layers.twins import Twins
from triton_ops.backend import uses_triton
from triton_ops.decode_attention import decode_attention
from triton_ops.prefix_attention import prefix_attention

ROOM = 16
GROWTH = 16
"""A full suffix moves into a storage with room for 1/16 more than it holds, and 16 tokens at least:
3% of it are unused on average. Moving more often costs more than it saves, as every move asks the
system for new pages."""


class Branching(PooledLayer):
    """What all kinds have in common.

    Attributes
    ----------
    trunk : Trunk
        What rows read besides their own tokens in the pool.
    twins : Twins
        Shared by the layers of a cache.
    """

    def __init__(self, twins: Twins, *settings: Any) -> None:
        self.twins = twins
        super().__init__(*settings)

    def _clear(self) -> None:
        super()._clear()
        self.trunk = Trunk()
        self._in_prompt = True

    # --------------------------------------------------------------------------------- one forward

    def store_first(self, chunk: Chunk) -> None:
        """See `GuardedLayer.store_first`; each different prompt is stored once."""
        batch, heads, _, _ = chunk.keys.shape
        self.first = torch.full((batch,), -1, device="cpu")
        self._place_first(self.seen - chunk.steps, chunk.valid)
        self.trunk = Trunk.of_rows(batch)
        self._make_pool(torch.zeros(batch, heads, dtype=torch.long, device="cpu"), chunk)
        self._share(chunk)

    def attend(self, chunk: Chunk) -> torch.Tensor:
        """See `GuardedLayer.attend`; chunks of the prompt are shared like a whole one."""
        out = super().attend(chunk)
        self._in_prompt = self._in_prompt and self._extended_prompt(chunk)
        if self._in_prompt:
            # All of the prompt before this chunk is in the trunk, so this is all that the pool has.
            pool = self._require_pool()
            self._make_pool(torch.zeros_like(pool.length), chunk)
            self._share(chunk)
        return out

    def _extended_prompt(self, chunk: Chunk) -> bool:
        """Whether a chunk that was attended to is part of the prompt, which all before it are."""
        return chunk.steps > 1 and not self.record_past

    def _make_pool(self, capacity: torch.Tensor, chunk: Chunk) -> None:
        self.pool = RaggedPool(capacity, chunk.keys, chunk.values, self.statistics)
        self._tail = 0

    def _share(self, chunk: Chunk) -> None:
        """Store a chunk of the prompt, once for all rows that have it in common."""
        paths = self.trunk.paths
        groups = torch.tensor([paths.index(path) for path in paths], device="cpu")
        columns = torch.arange(self.seen - chunk.steps, self.seen, device=chunk.keys.device)
        made: dict[int, Segment] = {}
        parts: list[Segment | None] = []
        for row, first in enumerate(self.twins.of(chunk, self.index, groups, self.shard).tolist()):
            if first == row:
                real = slice(None) if chunk.valid is None else chunk.valid[row]
                made[row] = Segment(
                    # Cloned: a slice would keep the rows of all copies alive.
                    chunk.keys[row][:, real].clone(),
                    chunk.values[row][:, real].clone(),
                    columns[real].to(torch.int32),
                )
            parts.append(made[first] if made[first].tokens else None)
        self.trunk = self.trunk.append(parts, join=True)

    def _attention(self, chunk: Chunk) -> Callable[..., torch.Tensor]:
        """See `PooledLayer._attention`."""
        prefix = self.trunk.as_prefix if uses_triton(chunk.keys) else None
        if prefix is not None:
            return partial(prefix_attention, prefix=prefix)
        return self._attend_apart

    def _attend_apart(self, *, query: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Attend to own and shared tokens one after the other, and join the results."""
        batch, heads, group, steps, _ = query.shape
        total = query.new_empty(batch, steps, heads * group, dtype=torch.float32)
        own = decode_attention(query=query, logsumexp=total, **arguments)
        scaling, softcap = arguments["scaling"], arguments["softcap"]
        return self.trunk.join_attention(query, own, total, scaling, softcap)

    def static_parts(self) -> Iterator[Any]:
        """See `PooledLayer.static_parts`."""
        yield from super().static_parts()
        yield self.trunk

    # ------------------------------------------------------------------------------------ all rows

    def hide(self, hidden: torch.Tensor) -> None:
        """See `GuardedLayer.hide`; rows that see different parts of a segment get their own."""
        super().hide(hidden)
        self.trunk = self.trunk.hide(hidden)

    @property
    def hides(self) -> bool:
        """See `PooledLayer.hides`."""
        return super().hides or any(self.trunk.aside)

    def _crop(self, columns: int) -> None:
        super()._crop(columns)
        self.trunk = self.trunk.crop(self.seen)

    def select_rows(self, rows: torch.Tensor) -> None:
        """See `GuardedLayer.select_rows`; what rows share is never copied."""
        if self.pool is not None:
            super().select_rows(rows)
            self.trunk = self.trunk.select_rows(rows)

    def fork(self, rows: torch.Tensor) -> None:
        """Like `select_rows`, for rows that will go on for long: what copies have in common is
        stored once, if the layer keeps all of it.
        """
        self.select_rows(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies beside each other."""
        if self.rows is not None:
            self.fork(torch.arange(self.rows, device="cpu").repeat_interleave(repeats))

    # --------------------------------------------------------------------------------------- report

    def held(self) -> torch.Tensor:
        """See `PooledLayer.held`."""
        return super().held() + self.trunk.lengths[:, None]

    def held_positions(self) -> list[list[list[int]]]:
        """See `PooledLayer.held_positions`."""
        return self._with_trunk(super().held_positions())

    def held_now(self) -> list[list[list[int]]]:
        """See `PooledLayer.held_now`."""
        return self._with_trunk(super().held_now())

    def _with_trunk(self, own: list[list[list[int]]]) -> list[list[list[int]]]:
        return [
            [sorted({*shared, *head}) for head in heads]
            for shared, heads in zip(self.trunk.columns(), own, strict=True)
        ]

    def dense(self, name: str) -> torch.Tensor | None:
        """See `GuardedLayer.dense`."""
        own = super().dense(name)
        return None if own is None else add_trunk(own, self.trunk, name)

    @property
    def unshared_bytes(self) -> int:
        """Bytes of keys and values if every row had its own copy of all that it reads."""
        own = distinct_bytes(super().kv_tensors())
        return own + sum(part.nbytes * count for part, count in self.trunk.readers.items())

    def kv_tensors(self) -> Iterator[torch.Tensor]:
        """See `PooledLayer.kv_tensors`."""
        yield from super().kv_tensors()
        yield from self.trunk.tensors()

    def tensors(self) -> Iterator[torch.Tensor]:
        """See `PooledLayer.tensors`."""
        yield from super().tensors()
        for part in self.trunk.segments:
            yield from (part.keys, part.values, part.columns)


class BranchedLayer(Branching):
    """One layer that keeps every token, what several rows have in common once.

    Attributes
    ----------
    reserved : int
        Own tokens per row that the pool has room for from the first on.
    """

    def __init__(self, twins: Twins, index: int) -> None:
        super().__init__(twins, index)
        self.reserved = 0

    def _make_room(self, steps: int) -> None:
        pool = self._require_pool()
        if steps > pool.least_free:
            # The same room for all, so that they fill up together.
            roomy = pool.length + steps + max(ROOM, pool.longest // GROWTH)
            enough = pool.longest + steps <= self.reserved
            pool.relayout(torch.full_like(roomy, self.reserved) if enough else roomy)

    def fork(self, rows: torch.Tensor) -> None:
        """See `Branching.fork`: the own tokens of a row that is repeated become a segment."""
        times = torch.bincount(rows, minlength=self.rows or 0)
        self.freeze((times > 1).nonzero()[:, 0])
        self.select_rows(rows)

    def freeze(self, rows: torch.Tensor) -> None:
        """Move the own tokens of some rows (LongTensor, CPU) into segments, one for each row.

        All heads hold the same tokens at the same places: nothing is ever evicted here.
        """
        pool = self._require_pool()
        counts = pool.length[:, 0]
        rows = rows[counts[rows] > 0]
        if not rows.numel():
            return
        parts: list[Segment | None] = [None] * len(counts)
        slots, _ = pool.slots(rows)
        for row, places in zip(rows.tolist(), slots, strict=True):
            places = places[:, : int(counts[row])]
            # What a mask has hidden left holes, which newer tokens fill.
            places = places[:, pool.fields["positions"][places[0]].argsort()]
            parts[row] = Segment(
                pool.fields["keys"][places],
                pool.fields["values"][places],
                pool.fields["positions"][places[0]],
            )
        self.trunk = self.trunk.append(parts)
        pool.length = pool.length.index_fill(0, rows, 0)
        pool.relayout(pool.length.clone())
        self._tail = 0

    def unfreeze(self, path: Path, first: int) -> None:
        """Add a row, behind the last one, that reads `path` and has no tokens of its own yet."""
        rows = self._require_pool().length.shape[0]
        new = torch.tensor([rows], device="cpu")
        self.select_rows(torch.arange(rows + 1, device="cpu") % rows)
        for pool in (self.pool, self.aside):
            if pool is not None:
                pool.length = pool.length.index_fill(0, new, 0)
        if self.shown is not None:
            self.shown = self.shown.index_fill(0, new.to(self.shown.device), True)
        self.trunk = self.trunk.with_last(path)
        self.first[rows] = first
        self._tail = 0
