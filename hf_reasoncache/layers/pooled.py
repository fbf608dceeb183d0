"""A layer on a ragged pool that keeps every token: fast, exact, the base of the evicting ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from hf_reasoncache.layers.aside import exchange, gathered
from hf_reasoncache.layers.chunk import Chunk
from hf_reasoncache.layers.dense import dense_tokens
from hf_reasoncache.layers.guarded import GuardedLayer
from hf_reasoncache.layers.pool import RaggedPool
from hf_reasoncache.layers.precision import without_autocast
from triton_ops.backend import uses_triton
from triton_ops.decode_attention import decode_attention, even_attention

FIRST_ROOM = 256
"""Slots allocated beyond the prompt when no budget says how long the text may become."""


def distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all storages behind some tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class PooledLayer(GuardedLayer):
    """One layer that holds its tokens in a `RaggedPool`.

    After `take_incoming` the attention function either lets the base implementation attend and
    calls `store_first`, or calls `attend`. Padding is known only there, hence tokens enter the pool
    there; padding never does.

    Attributes
    ----------
    pool : RaggedPool or None
        None until the first forward is stored.
    first : LongTensor[B]
        Column of each row's first real token, on the CPU; -1 while a row has only seen padding.
    clock : LongTensor[1] or None
        On the pool's device, set while a step is captured: the column of the one new token, read
        wherever the host's count would otherwise become part of the graph.
    aside : RaggedPool or None
        Tokens that the attention mask hides; replaced, never written to.
    evictions, evicted : int
        Compactions so far, each row counted; tokens evicted so far, each row and head counted.
    """

    evictions = evicted = 0
    statistics: Mapping[str, torch.dtype] = MappingProxyType({})

    def _clear(self) -> None:
        super()._clear()
        self.pool: RaggedPool | None = None
        self.first = torch.zeros(0, dtype=torch.long, device="cpu")
        self.clock: torch.Tensor | None = None
        self.aside: RaggedPool | None = None
        self._placed = False
        # Newest columns that every head is known to hold in its last slots, where a crop finds
        # them.
        self._tail = 0

    @property
    def rows(self) -> int | None:
        """Batch rows stored; None before the first forward."""
        return None if self.pool is None else self.pool.length.shape[0]

    @property
    def may_evict(self) -> bool:
        """See `GuardedLayer.may_evict`."""
        return False

    # --------------------------------------------------------------------------------- one forward

    def _begin(self, steps: int) -> None:
        """Nothing is ever due in a layer that keeps everything."""

    def store_first(self, chunk: Chunk) -> None:
        """See `GuardedLayer.store_first`."""
        batch, heads, steps, _ = chunk.keys.shape
        self.first = torch.full((batch,), -1, device="cpu")
        room = torch.full((batch, heads), steps + FIRST_ROOM, device="cpu")
        self.pool = RaggedPool(room, chunk.keys, chunk.values, self.statistics)
        self._append(chunk, self.seen)

    def attend(self, chunk: Chunk) -> torch.Tensor:
        """See `GuardedLayer.attend`."""
        self._make_room(chunk.steps)
        self._append(chunk, self.seen)
        return self._attend(chunk, self.seen)

    def take_back(self, steps: int) -> None:
        """Undo a forward of `steps` columns that was refused before or after they were stored."""
        if self._incoming is not None:
            self._incoming = None
            self.seen -= steps
        else:
            self._tail = 0
            self._crop(steps)

    def hide(self, hidden: torch.Tensor) -> None:
        """See `GuardedLayer.hide`."""
        pool = self._require_pool()
        before = pool.length
        self.aside = exchange(pool, self.aside, hidden)
        if pool.length is not before:
            self._tail = 0

    @property
    def hides(self) -> bool:
        """Whether the mask hides tokens that are held."""
        return self.aside is not None

    @property
    def expects_prompt(self) -> bool:
        """Whether a single token would still be part of the prompt."""
        return False

    # ---------------------------------------------------------------------------- captured steps

    def prepare(self) -> None:
        """Do what must be done before one new token, so that the step itself does nothing else.

        Afterwards the step has static shapes, allocates nothing that stays, and never waits: it can
        be captured, and replayed if `static_parts` are the same objects.
        """
        with without_autocast(self.device):
            self._begin(1)
        self._make_room(1)
        # Asked for here, so that it is not made within the step.
        _ = self._require_pool().device_length

    def static_parts(self) -> Iterator[Any]:
        """Yield the objects that a captured step reads and writes where they are."""
        pool = self._require_pool()
        yield from (pool.layout, pool.device_length, *pool.fields.values())

    def advance(self) -> None:
        """Take note of one token per row that a replayed step has stored."""
        self.seen += 1
        self._tail += 1
        self._require_pool().count_appended(1)

    # -------------------------------------------------------------------------------------- storage

    def _place_first(self, begin: int, valid: torch.Tensor | None) -> None:
        """Note where rows begin that had no real token before column `begin`."""
        if self._placed:
            return
        if valid is None:
            found = torch.full_like(self.first, begin)
        else:
            found = (begin + valid.int().argmax(-1)).where(valid.any(-1), -1).cpu()
        self.first = self.first.where(self.first >= 0, found)
        self._placed = bool((self.first >= 0).all())

    def _make_room(self, steps: int) -> None:
        pool = self._require_pool()
        if steps > pool.least_free:
            needed = pool.longest + steps
            doubled = max(2 * int(pool.capacity.max()), needed)
            pool.relayout(torch.full_like(pool.capacity, doubled))

    def _append(self, chunk: Chunk, end: int) -> None:
        """Append tokens whose last one is column `end - 1`."""
        batch, heads, steps, _ = chunk.keys.shape
        columns: torch.Tensor | int | None = self.clock
        if columns is None and steps == 1:
            columns = end - 1
        elif columns is None:
            columns = torch.arange(end - steps, end, device=chunk.keys.device)
        keep = None if chunk.valid is None else chunk.valid[:, None].expand(batch, heads, steps)
        self._place_first(end - steps, chunk.valid)
        self._require_pool().append(chunk.keys, chunk.values, columns, keep)
        self._tail = self._tail + steps if chunk.valid is None else 0

    def _attend(self, chunk: Chunk, end: int, **accumulate: Any) -> torch.Tensor:
        """Attend to the pool with queries whose last one is at column `end - 1`."""
        pool = self._require_pool()
        batch, query_heads, steps, head_size = chunk.query.shape
        heads, attention = pool.length.shape[1], self._attention(chunk)
        if attention is decode_attention and not accumulate and self._is_even(chunk):
            held = (pool.fields["keys"], pool.fields["values"], pool.layout, pool.longest)
            return even_attention(chunk.query, *held, chunk.settings["scaling"])
        asking = None
        if steps > 1:
            asking = torch.arange(end - steps, end, device=chunk.query.device)
            asking = asking.expand(batch, steps)
            if chunk.valid is not None:
                asking = asking.masked_fill(~chunk.valid, -1)
        return attention(
            query=chunk.query.reshape(batch, heads, query_heads // heads, steps, head_size),
            keys=pool.fields["keys"],
            values=pool.fields["values"],
            positions=pool.fields["positions"],
            layout=pool.layout,
            length=pool.length,
            device_length=pool.device_length if uses_triton(pool.fields["keys"]) else None,
            query_positions=asking,
            **chunk.settings,
            **accumulate,
        )

    def _is_even(self, chunk: Chunk) -> bool:
        """Whether one token asks heads that hold equally many, and no kernel is to answer."""
        pool, settings = self._require_pool(), chunk.settings
        return (
            chunk.steps == 1
            and pool.is_even
            and pool.longest > 0
            and settings["softcap"] is None
            and settings["s_aux"] is None
            and not uses_triton(pool.fields["keys"])
        )

    def _attention(self, chunk: Chunk) -> Callable[..., torch.Tensor]:
        """Return what attends to the pool; called with the arguments of `decode_attention`."""
        return decode_attention

    def _require_pool(self) -> RaggedPool:
        if self.pool is None:
            raise ValueError(
                f"layer {self.index}: expected stored tokens, got an empty cache layer."
            )
        return self.pool

    def _crop(self, columns: int) -> None:
        pool = self._require_pool()
        self.seen -= columns
        if self.aside is not None:
            self.aside = gathered([self.aside], lambda at: at < self.seen)
        if columns <= self._tail:
            pool.drop_newest(columns)
            self._tail -= columns
        else:
            rows = torch.arange(pool.length.shape[0], device="cpu")
            slots, offset = pool.slots(rows)
            keep = (pool.fields["positions"][slots] < self.seen) & (offset >= 0)
            pool.compact(rows, slots, offset, keep)
            self._tail = 0

    def select_rows(self, rows: torch.Tensor) -> None:
        """See `GuardedLayer.select_rows`."""
        if self.pool is not None:
            self.pool.select_rows(rows)
            self.first = self.first[rows]
        if self.aside is not None:
            self.aside = self.aside.snapshot(deep=False)
            self.aside.select_rows(rows)
        if self.shown is not None:
            self.shown = self.shown[rows.to(self.shown.device)]

    # --------------------------------------------------------------------------------------- report

    def held(self) -> torch.Tensor:
        """See `GuardedLayer.held`."""
        return torch.zeros(0, 0, device="cpu") if self.pool is None else self.pool.length

    def dense(self, name: str) -> torch.Tensor | None:
        """See `GuardedLayer.dense`."""
        if self.pool is None:
            return None
        if self.evicted:
            raise ValueError(
                f"layer {self.index}: expected to hold all {self.seen} columns, for {name} in one "
                f"tensor, got heads that hold {self.held().min()} to {self.held().max()} tokens, "
                "each its own; cache.held_positions(layer_idx) says which."
            )
        pools = [self.pool] if self.aside is None else [self.pool, self.aside]
        return dense_tokens(pools, name, self.seen)

    def kv_tensors(self) -> Iterator[torch.Tensor]:
        """Yield all keys and values."""
        for pool in (self.pool, self.aside):
            if pool is not None:
                yield from (pool.fields["keys"], pool.fields["values"])

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all tensors whose size grows with the tokens held."""
        for pool in (self.pool, self.aside):
            if pool is not None:
                yield from pool.fields.values()
        if self.shown is not None:
            yield self.shown

    @property
    def nbytes(self) -> int:
        """Bytes of all storages behind `tensors`, each counted once."""
        return distinct_bytes(self.tensors())

    def held_positions(self) -> list[list[list[int]]]:
        """Sorted columns that the last forward attended to, per row and KV head; padding is never
        listed.
        """
        return self.held_now()

    def held_now(self) -> list[list[list[int]]]:
        """Sorted columns that are held after all that the last forward has evicted."""
        return [] if self.pool is None else self.pool.held().lists()
