"""Causal attention for training on CPUs, from matrix products of a few blocks of queries each.

In bfloat16 at 550 tokens, forward and backward take less than half of what the fused kernel takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "blocked"
BLOCKS = 4
"""Of queries; each attends only to the keys up to its end."""


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return the output of causal attention, ``[B, T, H, D]``, without a cache.

    Parameters
    ----------
    module : nn.Module
        The layer; unused.
    query : Tensor ``[B, H, T, D]``
        Queries.
    key, value : Tensor ``[B, H_kv, T, D]``
        As many tokens as there are queries.
    attention_mask : None
        Padding can only be on the right.
    scaling : float
        Of the scores.
    """
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    size = -(-length // BLOCKS)
    found = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        some = query[:, :, start:stop].reshape(batch * kv_heads, group * (stop - start), dim)
        keys, values = (
            each[:, :, :stop].reshape(batch * kv_heads, stop, dim) for each in (key, value)
        )
        mask = torch.full((stop - start, stop), float("-inf"), dtype=query.dtype)
        mask = mask.triu(start + 1).repeat(group, 1)
        scores = torch.baddbmm(mask, some, keys.transpose(1, 2), alpha=scaling)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        found.append((weights @ values).view(batch, heads, stop - start, dim))
    return torch.cat(found, 2).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
