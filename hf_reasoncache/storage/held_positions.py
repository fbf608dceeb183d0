"""Which positions a layer holds, without the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from triton_ops.layout import RaggedLayout


@dataclass(frozen=True, eq=False)
class HeldPositions:
    """Which positions every head holds, without the tokens.

    Attributes
    ----------
    positions : IntTensor[slots]
    layout : RaggedLayout
    length : LongTensor[B, H_kv]
    """

    positions: torch.Tensor
    layout: RaggedLayout
    length: torch.Tensor

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield what grows with the tokens."""
        yield self.positions

    def lists(self) -> list[list[list[int]]]:
        """Sorted positions per row and KV head."""
        return [
            [
                sorted(self.positions[start : start + used].tolist())
                for start, used in zip(starts, lengths, strict=True)
            ]
            for starts, lengths in zip(
                self.layout.start.tolist(), self.length.tolist(), strict=True
            )
        ]


@dataclass(frozen=True, eq=False)
class AllPositions:
    """All real tokens of a first chunk, held by every head.

    Attributes
    ----------
    shape : sequence of int
        `B`, `H_kv` and the columns of the chunk.
    valid : BoolTensor[B, T] or None
        False for padding.
    """

    shape: Sequence[int]
    valid: torch.Tensor | None

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield what grows with the tokens: nothing that the mask does not hold anyway."""
        yield from ()

    def lists(self) -> list[list[list[int]]]:
        """Sorted positions per row and KV head."""
        batch, heads, q_len = self.shape
        if self.valid is None:
            return [[list(range(q_len)) for _ in range(heads)] for _ in range(batch)]
        columns = [row.nonzero()[:, 0].tolist() for row in self.valid]
        return [[list(row) for _ in range(heads)] for row in columns]
