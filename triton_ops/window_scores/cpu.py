"""`window_scores` in plain PyTorch, a few heads at a time and with no pass that is not needed."""

from __future__ import annotations

import torch

# Logits held at once (4 MB in float32).
TILE = 1 << 20


def window_scores_cpu(
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
    _, heads, group_size, window, _ = queries.shape
    seen = _seen(query_positions, key_positions, sees).expand(-1, heads, -1, -1, -1)
    # A head of a long prompt takes as much scratch as its keys; a few at a time keep it small.
    some = max(1, TILE // max(1, len(queries) * group_size * window * keys.shape[2]))
    parts = zip(queries.split(some, 1), keys.split(some, 1), seen.split(some, 1), strict=True)
    present = query_positions >= 0
    scores = [_of_heads(*part, present, scaling, group) for part in parts]
    return torch.cat(scores, dim=1)


def _of_heads(
    queries: torch.Tensor,
    keys: torch.Tensor,
    seen: torch.Tensor,
    present: torch.Tensor,
    scaling: float,
    group: str,
) -> torch.Tensor:
    """`window_scores` of a few heads, whose scratch is all that lives at once."""
    rows, heads, group_size, window, size = queries.shape
    dtype = torch.promote_types(keys.dtype, torch.float32)
    used, held = queries.to(dtype), keys.to(dtype)
    if not bool(present.all()):
        # An absent query may hold anything; zeroed, it can neither spread NaN nor win the maximum
        # of the group.
        used = used.where(present[:, None, None, :, None], 0.0)
    used = used.reshape(rows, heads, group_size * window, size)
    # Whichever is less to scale.
    if used.shape[2] < held.shape[2]:
        used = used * scaling
    else:
        held = held * scaling
    logits = used @ held.mT
    logits = logits.view(rows, heads, group_size, window, -1)
    if group == "max":
        logits = logits.amax(2, keepdim=True)
    if not bool(seen.all()):
        # The smallest finite number instead of -inf: a query that sees nothing yields numbers, not
        # NaN, and the second fill turns them into the zeros they should be.
        logits = logits.masked_fill_(~seen, torch.finfo(dtype).min)
    probabilities = logits.softmax(-1)
    if not bool(seen.any(-1).all()):
        probabilities = probabilities.masked_fill_(~seen, 0.0)
    lines = probabilities.shape[2]
    weights = present.to(dtype) / (lines * present.sum(-1, keepdim=True).clamp(min=1))
    return (weights.repeat(1, lines)[:, None, None] @ probabilities.flatten(2, 3)).squeeze(2)


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
