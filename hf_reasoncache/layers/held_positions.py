"""Which positions a layer holds, without the tokens."""

from __future__ import annotations

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

    @staticmethod
    def of(real: torch.Tensor) -> HeldPositions:
        """Return the columns where `real`, BoolTensor[B, H_kv, T], is true."""
        length = real.sum(-1).cpu()
        layout = RaggedLayout(length)
        positions = torch.empty(layout.slots, dtype=torch.int32, device=real.device)
        slot = layout.start.to(real.device)[..., None] + real.cumsum(-1) - 1
        column = torch.arange(real.shape[-1], dtype=torch.int32, device=real.device)
        positions[slot[real]] = column.expand_as(real)[real]
        return HeldPositions(positions, layout, length)

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
