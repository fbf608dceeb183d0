"""torch's fused attention, and on CPUs the logarithm of the sum of the weights with it."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from triton_ops import cpu

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Where there are instructions for tiles of bfloat16 (AMX), a few queries take as long together as
# sixteen. Two that share keys are faster one by one. Up to four are so in one thread, if the head's
# keys and values stay in the cache of the core meanwhile. Measured with heads of size 64 to 256.
_FEW_QUERIES = 4
_CACHED_BYTES = 1 << 20


def even_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kv_heads: int,
    tokens: int,
    scaling: float,
) -> torch.Tensor:
    """Attend with one query per head to a pool whose heads hold equally many tokens.

    `decode_attention` without all that such a pool does not need. In a model that is larger than
    the caches of a CPU, every small operation of a layer takes microseconds.

    Parameters
    ----------
    query : Tensor[B, H_q, 1, D]
    keys, values : Tensor[slots, D], Tensor[slots, D_v]
        The pool; all heads have the same capacity.
    kv_heads, tokens : int
        Heads of a row, and tokens that each of them holds: at least one.
    scaling : float

    Returns
    -------
    Tensor[B, 1, H_q, D_v]
    """
    batch, heads, _, size = query.shape
    k = _first_slots(keys, batch, kv_heads, tokens)
    v = _first_slots(values, batch, kv_heads, tokens)
    group = heads // kv_heads
    if _are_faster_alone(query, group, k, v):
        return _each_alone(query, k, v, scaling).transpose(1, 2)
    packed = query.reshape(batch, kv_heads, group, size)
    out = F.scaled_dot_product_attention(packed, k, v, scale=scaling)
    return out.reshape(batch, 1, heads, -1)


def _first_slots(field: torch.Tensor, batch: int, kv_heads: int, tokens: int) -> torch.Tensor:
    """View a per-slot tensor `[slots, D]` as `[B, H_kv, tokens, D]`."""
    slots, size = field.shape
    head = slots // (batch * kv_heads) * size
    return field.as_strided((batch, kv_heads, tokens, size), (kv_heads * head, head, size, 1))


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
    if bias is None and _are_faster_alone(query, query.shape[1], keys, values):
        single = query.reshape(1, -1, 1, query.shape[-1])
        return _each_alone(single, keys[None], values[None], scaling).reshape(query.shape)
    return F.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=bias, scale=scaling
    )[0]


def has_sums(query: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `fused_attention_with_sums` takes tensors of this device, type and size."""
    return (
        query.device.type == "cpu"
        and query.dtype in _DTYPES
        and query.shape[-1] == values.shape[-1]
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


def _are_faster_alone(
    query: torch.Tensor, queries: int, keys: torch.Tensor, values: torch.Tensor
) -> bool:
    """Whether `queries` that share keys are attended to faster one by one."""
    # The device is not asked for its type, which takes longer than all of this.
    if query.dtype != torch.bfloat16 or not query.is_cpu:
        return False
    tokens, size = keys.shape[-2:]
    fit = 2 * tokens * size * keys.dtype.itemsize <= _CACHED_BYTES
    return bool(
        cpu.capabilities().get("amx_bf16")
        and values.shape[-1] == size
        and (queries == 2 or (queries <= _FEW_QUERIES and fit and torch.get_num_threads() == 1))
    )


def _each_alone(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attend with queries `[B, C * M, 1, D]`, of which `M` neighbours share keys."""
    return F.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)
