"""`append` in plain PyTorch: its definition."""

from __future__ import annotations

import torch


def append_reference(
    pool: tuple[torch.Tensor, ...],
    start: torch.Tensor,
    length: torch.Tensor,
    new: tuple[torch.Tensor, ...],
    column: torch.Tensor | int,
    asked: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """See `triton_ops.append.append`."""
    slots = (start + length).flatten()
    positions = pool[-1].new_empty(len(slots))
    positions[:] = column
    for field, each in zip(pool, (*new, positions), strict=True):
        field.index_copy_(0, slots, each.reshape(-1, *field.shape[1:]))
    length.add_(1)
    if asked is not None:
        ring, query = asked
        place = column % ring.shape[2]
        if not isinstance(place, torch.Tensor):
            place = torch.full((1,), place, device=ring.device)
        ring.index_copy_(2, place, query)
