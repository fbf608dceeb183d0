"""`prefix_attention` in plain PyTorch: one matrix product per prefix and KV head, then a join."""

from __future__ import annotations

import torch

from ..decode_attention.cpu import decode_attention_cpu
from ..decode_attention.products import key_products, value_products
from ..layout import RaggedLayout, SharedPrefix
from ..merge_state.reference import merge_state_reference


def prefix_attention_cpu(
    query: torch.Tensor,
    prefix: SharedPrefix,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    layout: RaggedLayout,
    length: torch.Tensor,
    *,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    query_positions: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    logsumexp: torch.Tensor | None,
) -> torch.Tensor:
    """See `triton_ops.prefix_attention.prefix_attention`."""
    batch, kv_heads, group, steps, _ = query.shape
    own_sum = query.new_empty(batch, steps, kv_heads * group, dtype=torch.float32)
    own = decode_attention_cpu(
        query,
        keys,
        values,
        positions,
        layout,
        length,
        key_scales=key_scales,
        value_scales=value_scales,
        query_positions=query_positions,
        scaling=scaling,
        softcap=softcap,
        s_aux=s_aux,
        cumulative_attention=None,
        attention_weight=None,
        logsumexp=own_sum,
    )
    out, total = merge_state_reference(own, own_sum, *_shared(query, prefix, scaling, softcap))
    if logsumexp is not None:
        logsumexp.copy_(total)
    return out


def _shared(
    query: torch.Tensor, prefix: SharedPrefix, scaling: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every row to its prefix alone: `[B, T, H_q, D_v]` and `[B, T, H_q]`."""
    batch, kv_heads, group, steps, size = query.shape
    value_size = prefix.values.shape[-1]
    out = query.new_zeros(batch, kv_heads, group, steps, value_size)
    total = query.new_full(out.shape[:-1], -torch.inf, dtype=torch.float32)
    starts, lengths = prefix.layout.start.tolist(), prefix.length.tolist()
    for index, (begin, end) in enumerate(prefix.first.unfold(0, 2, 1).tolist()):
        rows = prefix.members[begin:end].to(query.device)
        for head in range(kv_heads):
            used = lengths[index][head]
            if not used or begin == end:
                continue
            own = slice(starts[index][head], starts[index][head] + used)
            keys, values = prefix.keys[None, own], prefix.values[None, own]
            key_scales, value_scales = (
                None if x is None else x[None, own]
                for x in (prefix.key_scales, prefix.value_scales)
            )
            asking = query[rows, head].reshape(1, -1, size)
            logits = key_products(asking, keys, key_scales)[0].mul_(scaling)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            # softmax and logsumexp in one: over a long prefix each pass over the logits counts.
            top = logits.amax(-1, keepdim=True)
            weights = logits.sub_(top).exp_()
            weight = weights.sum(-1, keepdim=True)
            part = value_products(weights[None], values, value_scales, query.dtype)[0] / weight
            out[rows, head] = part.view(-1, group, steps, value_size).to(out.dtype)
            total[rows, head] = (top + weight.log()).view(-1, group, steps)
    # [B, H_kv, G, T, ...] -> [B, T, H_q, ...]
    return out.flatten(1, 2).transpose(1, 2), total.flatten(1, 2).transpose(1, 2)
