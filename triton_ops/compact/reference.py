"""`compact` in plain PyTorch: its definition, and the CPU path."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def compact_reference(
    fields: Iterable[torch.Tensor], slots: torch.Tensor, offset: torch.Tensor, keep: torch.Tensor
) -> None:
    """See `triton_ops.compact.compact`."""
    kept = keep.sum(-1, keepdim=True)
    # Per head there are as many kept tokens beyond the limit as holes before it, and boolean
    # indexing walks the heads in the same order on both sides: the two lists pair up without a
    # per-head loop.
    moved = slots[keep & (offset >= kept)]
    holes = slots[~keep & (offset >= 0) & (offset < kept)]
    for field in fields:
        # Whole rows, 3 times faster on a CPU than indexing.
        field.index_copy_(0, holes, field.index_select(0, moved))
