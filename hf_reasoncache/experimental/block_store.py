"""Where a layer keeps its tokens when similar steps share blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from hf_reasoncache.experimental.blocks import Block, BlockTable
from hf_reasoncache.experimental.rotation import Rotation
from hf_reasoncache.storage.branch_store import GROWTH, ROOM
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.pool_store import PoolStore
from triton_ops.decode_attention import decode_attention
from triton_ops.merge_state import merge_state


def refusal(what: str) -> ValueError:
    """Return the error for a use of generate that blocks do not support."""
    return ValueError(
        f"StepShareCache: expected plain generate, greedy or sampled, got {what}; use "
        "SharedBranchCache, which shares exactly and supports it."
    )


class BlockStore(PoolStore):
    """A `PoolStore` whose rows read sealed blocks besides their newest tokens.

    New tokens enter the pool. `cut` takes the oldest of a row out of it, and `add` makes them, or
    what replaces them, blocks of the row. Rows cannot be reordered, and sealed tokens neither
    cropped nor hidden: another row may read them.

    Parameters
    ----------
    rotation : Rotation or None
        Moves shared keys to where they are read; None leaves them where they were computed.

    Attributes
    ----------
    table : BlockTable
        What rows read besides their own tokens in the pool.
    """

    shares = True

    def __init__(self, rotation: Rotation | None = None) -> None:
        self.rotation = rotation
        super().__init__()

    def clear(self) -> None:
        """See `PoolStore.clear`."""
        super().clear()
        self.table = BlockTable()

    # ------------------------------------------------------------------------------ tail and blocks

    def begin(self, new: NewTokens, end: int) -> None:
        """See `PoolStore.begin`."""
        super().begin(new, end)
        self.table = BlockTable.of_rows(len(self.first))

    def make_room(self, steps: int) -> None:
        """See `PoolStore.make_room`; tails end with their step, so they get little more."""
        if steps > self.least_free:
            self._resize(steps + self._spare)

    @property
    def _spare(self) -> int:
        return max(ROOM, self.tokens.longest // GROWTH)

    def _resize(self, free: int) -> None:
        pool = self.tokens
        pool.relayout(torch.full_like(pool.capacity, pool.longest + free))

    def cut(self, row: int, end: int) -> Block:
        """Take the tokens of a row before column `end` out of the pool."""
        rows = torch.tensor([row], device="cpu")
        found = self.read(rows, (torch.zeros_like(rows), torch.full_like(rows, end)))
        block = Block(
            # All heads hold the same tokens.
            found.columns[0, 0].to("cpu", torch.int32),
            found.field("keys")[0],
            found.field("values")[0],
        )
        self.evict(found, torch.zeros_like(found.valid))
        if self.least_free > 2 * self._spare:
            self._resize(self._spare)
        return block

    def add(self, row: int, blocks: Iterable[Block]) -> None:
        """Let a row read more blocks, in place of tokens that were cut."""
        self.table = self.table.append(row, blocks)

    # ------------------------------------------------------------------------------------ attention

    def _attention(self) -> Callable[..., torch.Tensor]:
        """See `PoolStore._attention`."""
        return self._attend_apart if any(self.table.rows) else decode_attention

    def _attend_apart(self, *, query: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Attend to tails and blocks one after the other, and join the results."""
        batch, heads, group, steps, _ = query.shape
        total = query.new_empty(batch, steps, heads * group, dtype=torch.float32)
        own = decode_attention(query=query, logsumexp=total, **arguments)
        table, sealed_total = self.table, torch.empty_like(total)
        sealed = decode_attention(
            query,
            self._sealed("keys").flatten(0, 2),
            self._sealed("values").flatten(0, 2),
            # Blocks are older than any query, so nobody asks for their positions.
            arguments["positions"],
            table.layout,
            table.length,
            device_length=table.device_length,
            query_positions=None,
            scaling=arguments["scaling"],
            softcap=arguments["softcap"],
            logsumexp=sealed_total,
        )
        return merge_state(own, total, sealed, sealed_total)[0]

    def _sealed(self, name: str) -> torch.Tensor:
        """Copy the keys or values of all blocks, as they are read; see `BlockTable.gathered`."""
        found = self.table.gathered(name)
        if name == "values" or self.rotation is None or self.table.offsets is None:
            return found
        return self.rotation.move(found, self.table.offsets)

    def static_parts(self) -> Iterator[Any]:
        """See `PoolStore.static_parts`."""
        yield from super().static_parts()
        yield self.table

    # ------------------------------------------------------------------------- masks, rows, undoing

    def hide(self, hidden: torch.Tensor) -> None:
        """Refuse to hide anything; see `PoolStore.hide`."""
        if bool(hidden.any()):
            raise refusal("an attention mask that hides columns which it has shown before")

    def crop(self, end: int, columns: int) -> None:
        """See `PoolStore.crop`; refuses to take sealed tokens back."""
        if any(column >= end for row in self.table.columns() for column in row[-1:]):
            raise refusal("a crop of sealed tokens")
        super().crop(end, columns)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Refuse: rows must stay those of the watcher."""
        raise refusal("other rows in the batch (beam search, branch_generate)")

    # --------------------------------------------------------------------------------------- report

    @property
    def elsewhere(self) -> torch.Tensor:
        """See `PoolStore.elsewhere`."""
        return self.table.lengths

    def held(self) -> torch.Tensor:
        """See `PoolStore.held`."""
        return super().held() + self.table.lengths[:, None]

    def with_shared(self, own: list[list[list[int]]]) -> list[list[list[int]]]:
        """See `PoolStore.with_shared`."""
        return [
            [sorted({*sealed, *head}) for head in heads]
            for sealed, heads in zip(self.table.columns(), own, strict=True)
        ]

    def dense(self, name: str, columns: int) -> torch.Tensor:
        """See `PoolStore.dense`; shared keys as they are read."""
        out = super().dense(name, columns)
        if any(self.table.rows):
            sealed = self._sealed(name)
            for row, places in enumerate(self.table.columns()):
                out[row, :, places] = sealed[row, :, : len(places)]
        return out

    @property
    def tail_bytes(self) -> int:
        """Bytes of keys and values that are in no block yet, without free slots."""
        if self.pool is None:
            return 0
        slot = sum(field[:1].nbytes for field in super().kv_tensors())
        return int(self.tokens.length.sum()) * slot

    def kv_tensors(self) -> Iterator[torch.Tensor]:
        """See `PoolStore.kv_tensors`."""
        yield from super().kv_tensors()
        yield from self.table.kv_tensors()

    def tensors(self) -> Iterator[torch.Tensor]:
        """See `PoolStore.tensors`."""
        yield from super().tensors()
        yield from self.table.kv_tensors()
        yield from (block.columns for block in chain(*self.table.rows))
