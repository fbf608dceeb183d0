"""Where a layer keeps its tokens when rows share what they have in common.

What is shared (the prompt, and the text before a fork) lies in the segments of a prefix tree, a
row's own text in the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from hf_reasoncache.shards import Shard
from hf_reasoncache.storage.dense import add_shared
from hf_reasoncache.storage.forms import AS_THEY_COME, Form
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.pool_store import PoolStore, distinct_bytes
from hf_reasoncache.storage.prefix_tree import PrefixTree
from hf_reasoncache.storage.prompt_deduplicator import PromptDeduplicator
from hf_reasoncache.storage.segment import Path, Segment, compact_copy
from triton_ops.decode_attention import decode_attention
from triton_ops.prefix_attention import prefix_attention

ROOM = 16
GROWTH = 16
"""A full suffix moves into a storage with room for 1/16 more than it holds, and 16 tokens at least:
3% of it are unused on average. Moving more often costs more than it saves, as every move asks the
system for new pages."""


class BranchStore(PoolStore):
    """A `PoolStore` whose rows read shared segments besides their own tokens.

    Parameters
    ----------
    deduplicator : PromptDeduplicator
        Shared by the layers of a cache.
    index : int
        Index of the layer in the model.
    form : Form
        See `PoolStore`.

    Attributes
    ----------
    tree : PrefixTree
        What rows read besides their own tokens in the pool.
    reserved : int
        Own tokens per row that the pool has room for from the first on, where all are kept.
    """

    shares = True

    def __init__(
        self, deduplicator: PromptDeduplicator, index: int, form: Form = AS_THEY_COME
    ) -> None:
        self.deduplicator, self.index, self.reserved = deduplicator, index, 0
        super().__init__(form)

    def clear(self) -> None:
        """See `PoolStore.clear`."""
        super().clear()
        self.tree = PrefixTree()

    # ----------------------------------------------------------------------------------- new tokens

    def store_first(self, new: NewTokens, end: int, shard: Shard) -> None:
        """See `PoolStore.store_first`; each different prompt is stored once."""
        batch, heads, _, _ = new.keys.shape
        self.begin(new, end)
        self.tree = PrefixTree.of_rows(batch)
        self.allocate(torch.zeros(batch, heads, dtype=torch.long, device="cpu"), new)
        self._share(new, end, shard)

    def extend_prompt(self, new: NewTokens, end: int, shard: Shard) -> None:
        """See `PoolStore.extend_prompt`; the tokens leave the pool, in which nothing else is."""
        self.allocate(torch.zeros_like(self.tokens.length), new)
        self._share(new, end, shard)

    def _share(self, new: NewTokens, end: int, shard: Shard) -> None:
        """Store tokens of the prompt, once for all rows that have them in common."""
        paths = self.tree.paths
        groups = torch.tensor([paths.index(path) for path in paths], device="cpu")
        columns = torch.arange(end - new.q_len, end, device=new.keys.device)
        fields = self.form.fields(new.keys, new.values)
        made: dict[int, Segment] = {}
        parts: list[Segment | None] = []
        for row, first in enumerate(self.deduplicator.of(new, self.index, groups, shard).tolist()):
            if first == row:
                real = slice(None) if new.valid is None else new.valid[row]
                # Cloned: a slice would keep the rows of all copies alive.
                own = {name: compact_copy(field[row][:, real]) for name, field in fields.items()}
                made[row] = Segment(self.form, own, columns[real].to(torch.int32))
            parts.append(made[first] if made[first].tokens else None)
        self.tree = self.tree.append(parts, join=True)

    def make_room(self, q_len: int) -> None:
        """See `PoolStore.make_room`."""
        pool = self.tokens
        if q_len <= pool.least_free:
            return
        slots = self._grown(pool.longest, q_len)
        # The same room for all, so that they fill up together.
        roomy = pool.length + (slots - pool.longest)
        pool.relayout(torch.full_like(roomy, slots) if slots == self.reserved else roomy)

    def _grown(self, held: int, q_len: int = 1) -> int:
        """Slots of a full suffix of `held` tokens once it has moved."""
        if held + q_len <= self.reserved:
            return self.reserved
        return held + q_len + max(ROOM, held // GROWTH)

    # ------------------------------------------------------------------------------------ attention

    def _attention(self) -> Callable[..., torch.Tensor]:
        """See `PoolStore._attention`."""
        prefix = self.tree.as_prefix if self.uses_kernels else None
        if prefix is not None:
            return partial(prefix_attention, prefix=prefix)
        return self._attend_apart

    def _attend_apart(self, *, query: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Attend to own and shared tokens one after the other, and join the results."""
        batch, heads, group, q_len, _ = query.shape
        total = query.new_empty(batch, q_len, heads * group, dtype=torch.float32)
        own = decode_attention(query=query, logsumexp=total, **arguments)
        scaling, softcap = arguments["scaling"], arguments["softcap"]
        return self.tree.join_attention(query, own, total, scaling, softcap)

    def static_parts(self) -> Iterator[Any]:
        """See `PoolStore.static_parts`."""
        yield from super().static_parts()
        yield self.tree

    # ------------------------------------------------------------------------- masks, rows, undoing

    def hide(self, hidden: torch.Tensor) -> None:
        """See `PoolStore.hide`; rows that see different parts of a segment get their own."""
        super().hide(hidden)
        self.tree = self.tree.hide(hidden)

    @property
    def hides(self) -> bool:
        """See `PoolStore.hides`."""
        return super().hides or any(self.tree.aside)

    def crop(self, end: int, columns: int) -> None:
        """See `PoolStore.crop`."""
        super().crop(end, columns)
        self.tree = self.tree.crop(end)

    def select_rows(self, rows: torch.Tensor) -> None:
        """See `PoolStore.select_rows`; what rows share is never copied."""
        if self.pool is not None:
            super().select_rows(rows)
            self.tree = self.tree.select_rows(rows)

    def fork(self, rows: torch.Tensor) -> None:
        """See `PoolStore.fork`: the own tokens of a row that is repeated become a segment."""
        times = torch.bincount(rows, minlength=self.rows or 0)
        self.freeze((times > 1).nonzero()[:, 0])
        self.select_rows(rows)

    def freeze(self, rows: torch.Tensor) -> None:
        """Move the own tokens of some rows (LongTensor, CPU) into segments, one for each row.

        All heads must hold the same tokens, as they do where nothing is evicted.
        """
        pool = self.tokens
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
            fields = {name: field[places] for name, field in pool.held_fields.items()}
            parts[row] = Segment(self.form, fields, pool.fields["positions"][places[0]])
        self.tree = self.tree.append(parts)
        pool.drop_all(rows)
        pool.relayout(pool.length.clone())
        self._tail = 0

    def add_row(self, path: Path, first: int) -> None:
        """Add a row, behind the last one, that reads `path` and has no tokens of its own yet."""
        rows = self.tokens.length.shape[0]
        new = torch.tensor([rows], device="cpu")
        self.select_rows(torch.arange(rows + 1, device="cpu") % rows)
        for pool in (self.pool, self.aside):
            if pool is not None:
                pool.drop_all(new)
        self.tree = self.tree.with_last(path)
        self.first[rows] = first
        self._tail = 0

    # --------------------------------------------------------------------------------------- report

    @property
    def elsewhere(self) -> torch.Tensor:
        """See `PoolStore.elsewhere`."""
        return self.tree.lengths

    def held(self) -> torch.Tensor:
        """See `PoolStore.held`."""
        return super().held() + self.tree.lengths[:, None]

    def with_shared(self, own: list[list[list[int]]]) -> list[list[list[int]]]:
        """See `PoolStore.with_shared`."""
        return [
            [sorted({*shared, *head}) for head in heads]
            for shared, heads in zip(self.tree.columns(), own, strict=True)
        ]

    def dense(self, name: str, columns: int) -> torch.Tensor:
        """See `PoolStore.dense`."""
        return add_shared(super().dense(name, columns), self.tree, name)

    def slots_without_budget(self, prompt: int, generated: int) -> int:
        """See `PoolStore.slots_without_budget`; the prompt is in no pool."""
        slots = 0
        while slots < generated:
            slots = self._grown(slots)
        return slots

    @property
    def unshared_bytes(self) -> int:
        """Bytes of keys and values if every row had its own copy of all that it reads."""
        own = distinct_bytes(super().kv_tensors())
        return own + sum(part.nbytes * count for part, count in self.tree.readers.items())

    def kv_tensors(self) -> Iterator[torch.Tensor]:
        """See `PoolStore.kv_tensors`."""
        yield from super().kv_tensors()
        yield from self.tree.tensors()

    def tensors(self) -> Iterator[torch.Tensor]:
        """See `PoolStore.tensors`."""
        yield from super().tensors()
        for part in self.tree.segments:
            yield from (*part.fields.values(), part.columns)
