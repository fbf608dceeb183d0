"""Attention of many rows to a prefix that they share, and to their own tokens behind it."""

from __future__ import annotations

from typing import Any

import torch

from ..backend import uses_triton
from ..layout import RaggedLayout, SharedPrefix
from .cpu import prefix_attention_cpu

__all__ = ["prefix_attention"]


def prefix_attention(
    query: torch.Tensor,
    prefix: SharedPrefix,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    layout: RaggedLayout,
    length: torch.Tensor,
    *,
    device_length: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    query_positions: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    logsumexp: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to a shared prefix and to the tokens that each head of a row holds itself.

    The prefix is read once for all its rows: their queries of a KV head are one matrix (Hydragen,
    arXiv 2402.05099). Ours: the prefix may hold another number of tokens per head, rows of several
    prefixes share a call, and on a GPU prefix and own tokens are parts of one launch and joined
    once.

    Parameters
    ----------
    query : Tensor[B, H_kv, G, T, D]
        Post-RoPE queries, the `G` query heads of a group beside the KV head that they read.
    prefix : SharedPrefix
        Every query sees all of it.
    keys, values, positions, layout, length, device_length, key_scales, value_scales
        The rows' own tokens, as in `decode_attention`; with scales if the prefix has some.
    query_positions, scaling, softcap, s_aux, logsumexp
        As in `decode_attention`.

    Returns
    -------
    Tensor[B, T, H_kv * G, D_v]

    Raises
    ------
    ValueError
        If the shapes do not fit together.
    """
    batch, kv_heads, _, steps, _ = query.shape
    if prefix.owner.shape != (batch,) or prefix.length.shape[1] != kv_heads:
        raise ValueError(
            f"prefix_attention: query {list(query.shape)} needs an owner for {batch} rows and "
            f"prefixes of {kv_heads} KV heads, got {list(prefix.owner.shape)} and "
            f"{list(prefix.length.shape)}."
        )
    if steps > 1 and query_positions is None:
        raise ValueError(
            f"prefix_attention: {steps} queries per row need query_positions [{batch}, {steps}] "
            "for causality, got None."
        )
    settings: dict[str, Any] = dict(
        key_scales=key_scales,
        value_scales=value_scales,
        query_positions=query_positions,
        scaling=scaling,
        softcap=softcap,
        s_aux=s_aux,
        logsumexp=logsumexp,
    )
    if uses_triton(query):
        from ..decode_attention.kernel import decode_attention_triton

        return decode_attention_triton(
            query, keys, values, positions, layout,
            length if device_length is None else device_length,
            cumulative_attention=None, attention_weight=None, prefix=prefix, **settings,
        )  # fmt: skip
    return prefix_attention_cpu(query, prefix, keys, values, positions, layout, length, **settings)
