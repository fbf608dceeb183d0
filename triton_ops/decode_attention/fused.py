"""torch's fused attention, and on CPUs the logarithm of the sum of the weights with it."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .. import cpu_features

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Where there are instructions for tiles of bfloat16 (AMX), a few queries take as long together as
# sixteen. Two that share keys are faster one by one. Up to four are so in one thread, if the head's
# keys and values stay in the cache of the core meanwhile. Measured with heads of size 64 to 256.
_FEW_QUERIES = 4
_CACHED_BYTES = 1 << 20


def fused_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attend without the logits in memory, on any device.

    Parameters
    ----------
    query, keys, values : Tensor[C, M, D], Tensor[C, N, D], Tensor[C, N, D_v]
    bias : Tensor[1, C, 1 or M, N] or None
        Added to the logits.
    scaling : float

    Returns
    -------
    Tensor[C, M, D_v]
    """
    if bias is None and _are_faster_alone(query, keys, values):
        single = query.reshape(1, -1, 1, query.shape[-1])
        out = F.scaled_dot_product_attention(
            single, keys[None], values[None], scale=scaling, enable_gqa=True
        )
        return out.reshape(query.shape)
    whole = _whole(keys, values)
    out = F.scaled_dot_product_attention(
        query[None], keys[None], whole[None], attn_mask=bias, scale=scaling
    )[0]
    return out[..., : values.shape[-1]]


def _whole(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return values of the size of the keys, where they are the first numbers of these (latents).

    The fused code of CPUs wants equal sizes. What it computes too much is less than what it saves:
    5.9 ms instead of 12.8 for 16 queries, 8,192 keys of 576 numbers and values of 512.
    """
    narrow = keys.is_cpu and values.shape[-1] < keys.shape[-1]
    if narrow and values.data_ptr() == keys.data_ptr() and values.stride() == keys.stride():
        return keys
    return values


def has_sums(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `fused_attention_with_sums` takes tensors of this device, type and size."""
    return (
        query.device.type == "cpu"
        and query.dtype in _DTYPES
        and query.shape[-1] == _whole(keys, values).shape[-1]
        # What scaled_dot_product_attention runs; the public function keeps the sums to itself.
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    )


def fused_attention_with_sums(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as `fused_attention` does; twice as fast as writing the logits out.

    Returns
    -------
    out : Tensor[C, M, D_v]
    logsumexp : Tensor[C, M]
        float32; -inf for a query whose keys all have the smallest finite bias.
    """
    if bias is not None:
        bias = bias.expand(-1, -1, query.shape[1], -1)
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], keys[None], _whole(keys, values)[None], 0.0, False,
        attn_mask=bias, scale=scaling,
    )  # fmt: skip
    total = total[0]
    return out[0][..., : values.shape[-1]], total.masked_fill(
        total < torch.finfo(query.dtype).min / 2, -torch.inf
    )


def _are_faster_alone(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether queries that share keys are attended to faster one by one."""
    # The device is not asked for its type, which takes longer than all of this.
    if query.dtype != torch.bfloat16 or not query.is_cpu:
        return False
    queries, (_, tokens, size) = query.shape[1], keys.shape
    fit = 2 * tokens * size * keys.dtype.itemsize <= _CACHED_BYTES
    return bool(
        cpu_features.capabilities().get("amx_bf16")
        and values.shape[-1] == size
        and (queries == 2 or (queries <= _FEW_QUERIES and fit and torch.get_num_threads() == 1))
    )
