"""Keys and values in blocks that several places of a text can point at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import torch

from triton_ops.layout import RaggedLayout


@dataclass(frozen=True, eq=False)
class Block:
    """Some tokens of one layer, as a row reads them.

    Attributes
    ----------
    columns : IntTensor[n]
        Columns of the padded sequence in which the row has them, ascending; on the CPU.
    keys, values : Tensor[H_kv, n, D], Tensor[H_kv, n, D_v]
        Perhaps those of other tokens. Never changed, and freed with the last block that has them.
    offset : int
        Positions that the keys have moved since they were computed.
    """

    columns: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    offset: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.keys.shape[1]

    def split(self, size: int) -> list[Block]:
        """Return blocks of at most `size` tokens; copies, so that each is freed by itself."""
        return [
            replace(
                self,
                columns=self.columns[first : first + size].clone(),
                keys=self.keys[:, first : first + size].clone(),
                values=self.values[:, first : first + size].clone(),
            )
            for first in range(0, self.tokens, size)
        ]

    def at(self, columns: torch.Tensor) -> Block:
        """Return the same keys and values for tokens in other columns, IntTensor[n]."""
        moved = int(columns[0]) - int(self.columns[0])
        return replace(self, columns=columns, offset=self.offset + moved)


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Which blocks the rows of one layer read; changes give a new object.

    Attributes
    ----------
    rows : tuple of tuple of Block
        The blocks of every row, oldest first.
    """

    rows: tuple[tuple[Block, ...], ...] = ()

    @staticmethod
    def of_rows(count: int) -> BlockTable:
        """Begin with rows that read nothing."""
        return BlockTable(((),) * count)

    def append(self, row: int, blocks: Iterable[Block]) -> BlockTable:
        """Let a row read more blocks."""
        rows = list(self.rows)
        rows[row] = (*rows[row], *blocks)
        return BlockTable(tuple(rows))

    @cached_property
    def lengths(self) -> torch.Tensor:
        """LongTensor[B]: tokens per head that each row reads here, on the CPU."""
        counts = [sum(block.tokens for block in row) for row in self.rows]
        return torch.tensor(counts, dtype=torch.long, device="cpu")

    @cached_property
    def layout(self) -> RaggedLayout:
        """Where `gathered` has the tokens of each row and head."""
        heads = next(chain(*self.rows)).keys.shape[0]
        longest = int(self.lengths.max())
        return RaggedLayout(torch.full((len(self.rows), heads), longest, device="cpu"))

    @cached_property
    def length(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: `lengths` of every head."""
        return self.lengths[:, None].repeat(1, self.layout.capacity.shape[1])

    @cached_property
    def device_length(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: `length` on the device of the blocks."""
        return self.length.to(next(chain(*self.rows)).keys.device)

    @cached_property
    def offsets(self) -> torch.Tensor | None:
        """LongTensor[B, N]: how far the keys of `gathered` have moved; None if none has."""
        if not any(block.offset for block in chain(*self.rows)):
            return None
        longest = int(self.lengths.max())
        offsets = [[x.offset for x in row for _ in range(x.tokens)] for row in self.rows]
        padded = [[*row, *[0] * (longest - len(row))] for row in offsets]
        return torch.tensor(padded, device=self.device_length.device)

    def gathered(self, name: str) -> torch.Tensor:
        """Copy the keys or values of all rows to one tensor.

        Parameters
        ----------
        name : {"keys", "values"}

        Returns
        -------
        Tensor[B, H_kv, N, D]
            The tokens of a row in order, then zeros.
        """
        like: torch.Tensor = getattr(next(chain(*self.rows)), name)
        out = like.new_zeros(*self.layout.capacity.shape, int(self.lengths.max()), like.shape[-1])
        for row, blocks in enumerate(self.rows):
            parts = [getattr(block, name) for block in blocks]
            torch.cat(parts, dim=1, out=out[row, :, : int(self.lengths[row])])
        return out

    def columns(self) -> list[list[int]]:
        """Columns that each row reads here."""
        return [[column for block in row for column in block.columns.tolist()] for row in self.rows]

    def kv_tensors(self) -> Iterator[torch.Tensor]:
        """Yield the keys and values of all blocks; what is shared, several times."""
        for block in chain(*self.rows):
            yield from (block.keys, block.values)
