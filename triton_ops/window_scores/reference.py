"""Definition of `window_scores` in plain PyTorch."""

from __future__ import annotations

import torch


def window_scores_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scaling: float,
    *,
    group: str,
    sees: str,
) -> torch.Tensor:
    """See `triton_ops.window_scores.window_scores`; arguments are taken as valid."""
    dtype = torch.promote_types(keys.dtype, torch.float32)
    # Everything below is [R, H, G or 1, A, N].
    logits = scaling * queries.to(dtype) @ keys.to(dtype)[:, :, None].mT
    if group == "max":
        logits = logits.amax(2, keepdim=True)
    at = key_positions[:, :, None, None]
    asked = query_positions[:, None, None, :, None]
    seen = (at >= 0) & (asked >= 0)
    if sees == "past":
        never = torch.iinfo(asked.dtype).max
        seen = seen & (at < asked.where(asked >= 0, never).amin(3, keepdim=True))
    elif sees == "causal":
        seen = seen & (at <= asked)
    # The softmax of a query that sees nothing is NaN.
    probabilities = logits.where(seen, -torch.inf).softmax(-1).where(seen, 0.0)
    present = (query_positions >= 0).sum(-1).clamp(min=1)
    return probabilities.mean(2).sum(2) / present[:, None, None]
