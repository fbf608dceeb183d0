"""`append` in plain PyTorch: its definition."""

from __future__ import annotations

import torch


def append_reference(
    pool: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    start: torch.Tensor,
    length: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    column: torch.Tensor | int,
) -> None:
    """See `triton_ops.append.append`."""
    slots = (start + length).flatten()
    positions = pool[2].new_empty(len(slots))
    positions[:] = column
    for field, new in zip(pool, (keys, values, positions), strict=True):
        field.index_copy_(0, slots, new.reshape(-1, *field.shape[1:]))
    length.add_(1)
