"""The attention that keys receive: a second pass over them, once the weight of all is known."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..tiles import LOG2_E, NOTHING, UPCAST, Tile, load_rows, parts, tile_logits
from .chunk_kernel import load_chunk, load_pool, load_queries, load_scales
from .work import Work


@triton.jit
def load_asking(row, real, attention_weight, query_positions, logsumexp, head, heads, group, steps):
    """Load what else is known of queries: logsumexp to base 2, positions, weights (0 for none)."""
    step = head // heads * steps + row % steps
    query_head = head % heads * group + row // steps
    where = step.to(tl.int64) * (heads * group) + query_head
    lse = tl.load(logsumexp + where, mask=real, other=0.0) * LOG2_E
    asking = step
    if query_positions is not None:
        asking = tl.load(query_positions + step, mask=real, other=-1)
    factor = real.to(tl.float32)
    if attention_weight is not None:
        factor = tl.load(attention_weight + row % steps, mask=real, other=0.0).to(tl.float32)
    return lse, asking, factor


@triton.jit
def received(logits, lse, asking, factor, query_positions, positions, slot, used):
    """Probabilities of a tile of keys, summed over a tile of queries with their weights."""
    visible = used[None, :]
    if query_positions is not None:
        position = tl.load(positions + slot, mask=used, other=0)
        visible = visible & (position[None, :] <= asking[:, None])
    # The logsumexp of a query that sees nothing is -inf, and is masked.
    weights = tl.exp2(tl.where(visible, logits - lse[:, None], NOTHING))
    return tl.sum(weights * factor[:, None], 0)


@triton.jit(do_not_specialize=["chunk", "steps", "scales_stride"])
def cumulative_kernel(
    cumulative_attention,
    attention_weight,
    query,
    keys,
    positions,
    key_scales,
    scales_stride,
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
    ONE_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Add to every slot of a chunk its probability, summed over the queries of the head.

    One program owns a slot, so nothing is atomic and the sum has one order. Where all queries are
    `ONE_TILE`, it stays in place, and the keys are loaded ahead.
    """
    head, first, end, _ = load_chunk(items, tl.program_id(0), start, length, chunk)
    rows = group * steps
    # As queries are loaded.
    TYPE: tl.constexpr = tl.float32 if UPCAST else query.dtype.element_ty
    if ONE_TILE:
        row, place, real, q = load_queries(query, head, 0, rows, D, BLOCK_M, BLOCK_D)
        q_rest = None
        if BLOCK_REST > 0:
            q_rest = load_rows(query, place, real, D, BLOCK_REST, BLOCK_D)
        lse, asking, factor = load_asking(
            row, real, attention_weight, query_positions, logsumexp, head, heads, group, steps
        )
    for at in tl.range(first, end, BLOCK_N):
        slot = at + tl.arange(0, BLOCK_N)
        used = slot < end
        k = load_pool(keys, key_scales, slot, used, TYPE, D, BLOCK_D)
        k_rest = None
        if BLOCK_REST > 0:
            k_rest = load_pool(keys, key_scales, slot, used, TYPE, D, BLOCK_REST, BLOCK_D)
        key_scale = load_scales(key_scales, scales_stride, slot, used)
        if ONE_TILE:
            logits = tile_logits(q, k, scale, softcap, q_rest, k_rest, key_scale)
            added = received(logits, lse, asking, factor, query_positions, positions, slot, used)
        else:
            added = tl.zeros([BLOCK_N], tl.float32)
            for begin in tl.range(0, rows, BLOCK_M):
                row, place, real, q = load_queries(query, head, begin, rows, D, BLOCK_M, BLOCK_D)
                q_rest = None
                if BLOCK_REST > 0:
                    q_rest = load_rows(query, place, real, D, BLOCK_REST, BLOCK_D)
                logits = tile_logits(q, k, scale, softcap, q_rest, k_rest, key_scale)
                lse, asking, factor = load_asking(
                    row, real, attention_weight, query_positions, logsumexp, head, heads, group,
                    steps,
                )  # fmt: skip
                added += received(
                    logits, lse, asking, factor, query_positions, positions, slot, used
                )
        before = tl.load(cumulative_attention + slot, mask=used, other=0.0)
        tl.store(cumulative_attention + slot, before + added, mask=used)


def add_received_attention(
    cumulative_attention: torch.Tensor,
    attention_weight: torch.Tensor | None,
    query: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    key_scales: torch.Tensor | None,
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
    block, rest = parts(head_size)
    tile = Tile.of(query.dtype, group * steps, block + rest)
    one_tile = group * steps <= tile.m
    # Logits and keys of a tile are held at once: 64 keys spill where either is wide, and 32 very
    # wide ones beside passing queries.
    if one_tile and head_size <= 128:
        keys_at_once = tile.n
    else:
        keys_at_once = 32 if one_tile or head_size <= 256 else 16
    cumulative_kernel[(plan.count,)](
        cumulative_attention,
        attention_weight,
        query,
        keys,
        positions,
        key_scales,
        1 if key_scales is None else key_scales.stride(0),
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
        ONE_TILE=one_tile,
        BLOCK_M=tile.m,
        BLOCK_N=keys_at_once,
        BLOCK_D=block,
        BLOCK_REST=rest,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
