"""Definition of `decode_attention` in plain PyTorch, head by head."""

from __future__ import annotations

import torch

from ..fp8.reference import dequantise_reference
from ..layout import RaggedLayout


def decode_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    layout: RaggedLayout,
    length: torch.Tensor,
    *,
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
    """See `triton_ops.decode_attention.decode_attention`; a query that sees nothing yields 0."""
    batch, kv_heads, group, steps, _ = query.shape
    keys, values = in_full(keys, key_scales, query), in_full(values, value_scales, query)
    out = query.new_zeros(batch, steps, kv_heads * group, values.shape[-1])
    for row in range(batch):
        for head in range(kv_heads):
            own = layout.head(row, head, length)
            asking = None if query_positions is None else query_positions[row, :, None]
            visible = None if asking is None else positions[own] <= asking
            members = slice(head * group, (head + 1) * group)
            sinks = None if s_aux is None else s_aux[members]
            result, weights, total = attend(
                query[row, head], keys[own], values[own], visible, scaling, softcap, sinks
            )
            out[row, :, members] = result.transpose(0, 1)
            if logsumexp is not None:
                logsumexp[row, :, members] = total.T
            if cumulative_attention is not None:
                each = 1.0 if attention_weight is None else attention_weight[:, None]
                cumulative_attention[own] += (weights * each).sum((0, 1))
    return out


def in_full(rows: torch.Tensor, scales: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    """Return keys or values as numbers, Tensor[slots, D]; see `triton_ops.fp8`."""
    if scales is None:
        return rows
    return dequantise_reference(rows, scales, torch.promote_types(query.dtype, torch.float32))


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax attention of the queries of one group to the tokens of one KV head.

    Parameters
    ----------
    query, keys, values : Tensor[G, T, D], Tensor[N, D], Tensor[N, D_v]
    visible : BoolTensor[T, N], optional
        Tokens that a query sees; all by default.
    scaling, softcap
        As in `decode_attention`.
    sinks : Tensor[G], optional

    Returns
    -------
    out : Tensor[G, T, D_v]
    weights : Tensor[G, T, N]
    logsumexp : Tensor[G, T]
        Counts the sinks.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = scaling * query.to(dtype) @ keys.to(dtype).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        logits = logits.where(visible, -torch.inf)
    counted = logits
    if sinks is not None:
        sink = sinks.to(dtype)[:, None, None].expand(*logits.shape[:2], 1)
        counted = torch.cat([logits, sink], -1)
    total = counted.logsumexp(-1)
    # -inf less -inf is NaN: a query that sees nothing gives no weight.
    weights = (logits - total[..., None]).exp().where(logits > -torch.inf, 0.0)
    return weights @ values.to(dtype), weights, total
