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
    rows, heads, group_size, window, size = queries.shape
    dtype = torch.promote_types(keys.dtype, torch.float32)
    present = query_positions >= 0
    # An absent query may hold anything; zeroed, it can neither spread NaN nor win the maximum of
    # the group.
    used = (queries.to(dtype) * scaling).where(present[:, None, None, :, None], 0.0)
    logits = used.reshape(rows, heads, group_size * window, size) @ keys.to(dtype).mT
    logits = logits.view(rows, heads, group_size, window, -1)
    if group == "max":
        logits = logits.amax(2, keepdim=True)

    seen = _seen(query_positions, key_positions, sees)
    # The smallest finite number instead of -inf: a query that sees nothing yields numbers, not NaN,
    # and the second fill turns them into the zeros they should be.
    probabilities = logits.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1)
    probabilities = probabilities.masked_fill(~seen, 0.0).mean(2)
    weights = present.to(dtype) / present.sum(-1, keepdim=True).clamp(min=1)
    return (weights[:, None, None, :] @ probabilities).squeeze(2)


def _seen(query_positions: torch.Tensor, key_positions: torch.Tensor, sees: str) -> torch.Tensor:
    """Which key each query attends to: BoolTensor `[R, H, 1, 1 or A, N]`."""
    held = key_positions >= 0
    if sees == "all":
        return held[:, :, None, None, :]
    if sees == "past":
        never = torch.iinfo(query_positions.dtype).max
        oldest = query_positions.masked_fill(query_positions < 0, never).amin(-1)
        return (held & (key_positions < oldest[:, None, None]))[:, :, None, None, :]
    causal = key_positions[:, :, None, :] <= query_positions[:, None, :, None]
    return (held[:, :, None, :] & causal)[:, :, None]
