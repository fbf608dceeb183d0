"""The attention that keys receive: a second pass over them, once the weight of all is known."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..tiles import LOG2_E, NOTHING, Tile, block_d, load_rows, tile_logits
from .chunk_kernel import load_chunk, load_queries
from .work import Work


@triton.jit
def cumulative_kernel(
    cumulative_attention,
    attention_weight,
    query,
    keys,
    positions,
    query_positions,
    start,
    length,
    items,
    logsumexp,
    scale,
    softcap,
    chunk,
    heads,
    group,
    steps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add to every slot of a chunk its probability, summed over the queries of the head.

    One program owns a slot, so nothing is atomic and the sum has one order.
    """
    head, first, end, _ = load_chunk(items, tl.program_id(0), start, length, chunk)
    rows = group * steps
    for at in tl.range(first, end, BLOCK_N):
        slot = at + tl.arange(0, BLOCK_N)
        used = slot < end
        k = load_rows(keys, slot, used, D, BLOCK_D)
        added = tl.zeros([BLOCK_N], tl.float32)
        for begin in tl.range(0, rows, BLOCK_M):
            row, real, q = load_queries(query, head, begin, rows, D, BLOCK_M, BLOCK_D)
            step = head // heads * steps + row % steps
            query_head = head % heads * group + row // steps
            where = step.to(tl.int64) * (heads * group) + query_head
            lse = tl.load(logsumexp + where, mask=real, other=0.0) * LOG2_E
            visible = used[None, :] & real[:, None]
            if query_positions is not None:
                position = tl.load(positions + slot, mask=used, other=0)
                asking = tl.load(query_positions + step, mask=real, other=-1)
                visible = visible & (position[None, :] <= asking[:, None])
            logits = tile_logits(q, k, scale, softcap)
            # The logsumexp of a query that sees nothing is -inf, and is masked.
            weights = tl.exp2(tl.where(visible, logits - lse[:, None], NOTHING))
            if attention_weight is not None:
                factor = tl.load(attention_weight + row % steps, mask=real, other=0.0)
                weights = weights * factor.to(tl.float32)[:, None]
            added += tl.sum(weights, 0)
        before = tl.load(cumulative_attention + slot, mask=used, other=0.0)
        tl.store(cumulative_attention + slot, before + added, mask=used)


def add_received_attention(
    cumulative_attention: torch.Tensor,
    attention_weight: torch.Tensor | None,
    query: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    query_positions: torch.Tensor | None,
    start: torch.Tensor,
    length: torch.Tensor,
    plan: Work,
    logsumexp: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None,
) -> None:
    """Add attention probabilities to `cumulative_attention`; see `decode_attention`."""
    _, kv_heads, group, steps, head_size = query.shape
    tile = Tile.of(keys.dtype, group * steps, head_size)
    cumulative_kernel[(plan.count,)](
        cumulative_attention,
        attention_weight,
        query,
        keys,
        positions,
        query_positions,
        start,
        length,
        plan.items,
        logsumexp,
        scaling,
        softcap,
        plan.chunk,
        kv_heads,
        group,
        steps,
        head_size,
        BLOCK_M=tile.m,
        # Logits and keys of a tile are held at once: 64 keys of size 256 spill.
        BLOCK_N=tile.n if head_size <= 128 else 32,
        BLOCK_D=block_d(head_size),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
