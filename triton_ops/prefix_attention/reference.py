"""Definition of `prefix_attention` in plain PyTorch: every row holds its prefix before its own."""

from __future__ import annotations

import torch

from ..decode_attention.reference import attend, in_full
from ..layout import RaggedLayout, SharedPrefix


def prefix_attention_reference(
    query: torch.Tensor,
    prefix: SharedPrefix,
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
    logsumexp: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `triton_ops.prefix_attention.prefix_attention`; who sees nothing yields 0."""
    batch, kv_heads, group, steps, _ = query.shape
    keys, values = in_full(keys, key_scales, query), in_full(values, value_scales, query)
    shared_keys = in_full(prefix.keys, prefix.key_scales, query)
    shared_values = in_full(prefix.values, prefix.value_scales, query)
    out = query.new_zeros(batch, steps, kv_heads * group, values.shape[-1])
    for row in range(batch):
        for head in range(kv_heads):
            own = layout.head(row, head, length)
            shared = prefix.layout.head(int(prefix.owner[row]), head, prefix.length)
            k = torch.cat([shared_keys[shared], keys[own]])
            v = torch.cat([shared_values[shared], values[own]])
            visible = torch.ones(steps, len(k), dtype=torch.bool, device=k.device)
            if query_positions is not None:
                behind = visible[:, shared.stop - shared.start :]
                behind &= positions[own] <= query_positions[row, :, None]
            members = slice(head * group, (head + 1) * group)
            sinks = None if s_aux is None else s_aux[members]
            result, _, total = attend(query[row, head], k, v, visible, scaling, softcap, sinks)
            out[row, :, members] = result.transpose(0, 1)
            if logsumexp is not None:
                logsumexp[row, :, members] = total.T
    return out
