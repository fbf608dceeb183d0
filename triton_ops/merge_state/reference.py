"""`merge_state` in plain PyTorch: its definition, and the CPU path."""

from __future__ import annotations

import torch


def merge_state_reference(
    out: torch.Tensor, logsumexp: torch.Tensor, other: torch.Tensor, other_logsumexp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `triton_ops.merge_state.merge_state`."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    parts = torch.stack([logsumexp, other_logsumexp]).to(dtype)
    total = parts.logsumexp(0)
    # -inf less -inf is NaN: where both saw nothing, both count nothing.
    first, second = (parts - total).exp().nan_to_num(0.0).unsqueeze(-1)
    return (out.to(dtype) * first + other.to(dtype) * second).to(out.dtype), total
