"""Attention of one query token, or a small chunk, over a ragged pool of keys and values."""

from __future__ import annotations

from typing import Any

import torch

from ..backend import uses_triton
from ..layout import RaggedLayout
from .cpu import decode_attention_cpu, even_attention

__all__ = ["decode_attention", "even_attention"]


def decode_attention(
    query: torch.Tensor,
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
    cumulative_attention: torch.Tensor | None = None,
    attention_weight: torch.Tensor | None = None,
    logsumexp: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the tokens that each head holds.

    Parameters
    ----------
    query : Tensor[B, H_kv, G, T, D]
        Post-RoPE queries, the `G` query heads of a group beside the KV head that they read.
    keys, values : Tensor[slots, D], Tensor[slots, D_v]
        The pool. Unused slots must hold finite numbers; they get no weight. The kernels take
        contiguous tensors, or values that are the first columns of the keys, `keys[:, :D_v]`, which
        they read from memory once.
    positions : IntTensor[slots]
        Logical position of each slot, read only when `query_positions` is given.
    layout : RaggedLayout
    length : LongTensor[B, H_kv]
        Slots in use of each head, on the CPU. A head that holds nothing yields a finite,
        meaningless row.
    device_length : LongTensor[B, H_kv], optional
        The same on the pool's device. The kernels read it there; without it, every call copies
        `length` to the device.
    key_scales, value_scales : Tensor[slots], optional
        With them, keys or values are codes of 8 bits, ByteTensor (`triton_ops.fp8`): a row is its
        code times its scale. It is multiplied into logits and probabilities, and no copy of the
        pool in more bits is made.
    query_positions : LongTensor[B, T] or None
        A query sees the keys at its own position and before. None: every query sees every held
        token, which is the case of a single new token.
    scaling : float
        Factor on the logits.
    softcap : float, optional
        Logits become `softcap * tanh(logits / softcap)` (Gemma 2).
    s_aux : Tensor[H_kv * G], optional
        One learned logit per query head that takes part in the softmax and carries no value
        (GPT-OSS sinks).
    cumulative_attention : Tensor[slots], optional
        float32; every slot's attention probability, summed over queries and group, is added in
        place.
    attention_weight : Tensor[T], optional
        Weight of each query in `cumulative_attention`; ones by default.
    logsumexp : Tensor[B, T, H_kv * G], optional
        float32, contiguous; overwritten with the logarithm of the sum of the exponentials of each
        query's logits, the sink's included; -inf for a query that sees nothing. With it,
        `merge_state` joins the result with attention to other tokens.

    Returns
    -------
    Tensor[B, T, H_kv * G, D_v]
        In the layout that transformers' attention functions return.

    Raises
    ------
    ValueError
        If the shapes do not fit together, or a kernel cannot read the pool's strides.
    """
    batch, kv_heads, _, steps, head_size = query.shape
    if keys.shape[-1] != head_size or tuple(length.shape) != (batch, kv_heads):
        raise ValueError(
            f"decode_attention: query {tuple(query.shape)} needs keys [slots, {head_size}] and "
            f"length [{batch}, {kv_heads}], got {tuple(keys.shape)} and {tuple(length.shape)}; "
            "check that the query heads are grouped as [B, H_kv, G, T, D]."
        )
    if steps > 1 and query_positions is None:
        raise ValueError(
            f"decode_attention: {steps} queries per row need query_positions [{batch}, {steps}] "
            "for causality, got None."
        )
    if logsumexp is not None and (
        logsumexp.dtype != torch.float32
        or logsumexp.shape != (batch, steps, kv_heads * query.shape[2])
        or not logsumexp.is_contiguous()
    ):
        raise ValueError(
            f"decode_attention: expected logsumexp float32 [{batch}, {steps}, "
            f"{kv_heads * query.shape[2]}] and contiguous, got {logsumexp.dtype} "
            f"{list(logsumexp.shape)} with strides {logsumexp.stride()}."
        )
    arguments: dict[str, Any] = dict(
        key_scales=key_scales,
        value_scales=value_scales,
        query_positions=query_positions,
        scaling=scaling,
        softcap=softcap,
        s_aux=s_aux,
        cumulative_attention=cumulative_attention,
        attention_weight=attention_weight,
        logsumexp=logsumexp,
    )
    if uses_triton(query):
        from .kernel import decode_attention_triton

        held = length if device_length is None else device_length
        return decode_attention_triton(query, keys, values, positions, layout, held, **arguments)
    return decode_attention_cpu(query, keys, values, positions, layout, length, **arguments)
