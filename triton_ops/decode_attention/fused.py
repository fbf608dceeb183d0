"""torch's fused attention for CPUs, where it also says the logarithm of the sum of the weights."""

from __future__ import annotations

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_fused(query: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `fused_attention` takes tensors of this device, type and size."""
    return (
        query.device.type == "cpu"
        and query.dtype in _DTYPES
        and query.shape[-1] == values.shape[-1]
        # What scaled_dot_product_attention runs; the public function keeps the sums to itself.
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    )


def fused_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend without the logits in memory; twice as fast as writing them out.

    Parameters
    ----------
    query, keys, values : Tensor[C, M, D], Tensor[C, N, D], Tensor[C, N, D]
    bias : Tensor[1, C, 1 or M, N] or None
        Added to the logits.
    scaling : float

    Returns
    -------
    out : Tensor[C, M, D]
    logsumexp : Tensor[C, M]
        float32; -inf for a query whose keys all have the smallest finite bias.
    """
    if bias is not None:
        bias = bias.expand(-1, -1, query.shape[1], -1)
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], keys[None], values[None], 0.0, False, attn_mask=bias, scale=scaling
    )
    total = total[0]
    return out[0], total.masked_fill(total < torch.finfo(query.dtype).min / 2, -torch.inf)
