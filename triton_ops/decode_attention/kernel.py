"""Attention to the chunks of a ragged pool, and the launches that make `decode_attention`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from triton_ops.decode_attention.mass_kernel import add_mass
from triton_ops.decode_attention.work import work
from triton_ops.layout import RaggedLayout
from triton_ops.merge_state.kernel import join
from triton_ops.tiles import NOTHING, Tile, block_d, load_rows, tile_logits


@triton.jit
def attend_chunk(
    q,
    asking,
    keys,
    values,
    positions,
    begin,
    end,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Softmax of a tile of queries over slots `begin` to `end - 1`: output and log2 of its sum."""
    top = tl.full([BLOCK_M], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        used = slot < end
        k = load_rows(keys, slot, used, D, BLOCK_D)
        logits = tile_logits(q, k, scale, softcap)
        visible = used[None, :]
        if asking is not None:
            at = tl.load(positions + slot, mask=used, other=0)
            visible = visible & (at[None, :] <= asking[:, None])
        logits = tl.where(visible, logits, NOTHING)
        higher = tl.maximum(top, tl.max(logits, 1))
        # Where nothing has been seen yet, all differences are 0, hence the second mask.
        weights = tl.where(visible, tl.exp2(logits - higher[:, None]), 0.0)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = load_rows(values, slot, used, DV, BLOCK_DV)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    seen = total > 0.0
    safe = tl.where(seen, total, 1.0)
    return acc / safe[:, None], tl.where(seen, top + tl.log2(safe), NOTHING)


@triton.jit
def store_partial(partial_out, partial_lse, at, real, out, lse, DV: tl.constexpr):
    """Write the partial results of a tile of queries."""
    column = tl.arange(0, out.shape[1])
    tl.store(partial_lse + at, lse, mask=real)
    inside = real[:, None] & (column < DV)[None, :]
    tl.store(partial_out + at[:, None] * DV + column[None, :], out, mask=inside)


@triton.jit
def attend_kernel(
    query,
    keys,
    values,
    positions,
    query_positions,
    start,
    length,
    items,
    partial_out,
    partial_lse,
    scale,
    softcap,
    chunk,
    heads,
    rows,
    steps,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One chunk of one head, attended to by a tile of the queries that belong to the head."""
    item = items + 3 * tl.program_id(0)
    head = tl.load(item)
    offset = tl.load(item + 1)
    partial = tl.load(item + 2).to(tl.int64)
    first = tl.load(start + head)
    end = first + tl.minimum(offset + chunk, tl.load(length + head))

    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < rows
    q = load_rows(query, head.to(tl.int64) * rows + row, real, D, BLOCK_D)
    asking = None
    if query_positions is not None:
        # A padding row asks at -1 and sees nothing.
        asking = tl.load(query_positions + head // heads * steps + row % steps, mask=real, other=-1)
    out, lse = attend_chunk(
        q,
        asking,
        keys,
        values,
        positions,
        first + offset,
        end,
        scale,
        softcap,
        D,
        DV,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        BLOCK_DV,
    )
    store_partial(partial_out, partial_lse, partial * rows + row, real, out, lse, DV)


def decode_attention_triton(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    layout: RaggedLayout,
    length: torch.Tensor,
    *,
    query_positions: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    mass: torch.Tensor | None,
    mass_weight: torch.Tensor | None,
    logsumexp: torch.Tensor | None,
) -> torch.Tensor:
    """See `triton_ops.decode_attention.decode_attention`."""
    batch, kv_heads, group, steps, head_size = query.shape
    value_size, device, rows = values.shape[-1], query.device, group * steps
    tile = Tile.of(keys.dtype, rows, head_size, value_size)
    tiles = triton.cdiv(rows, tile.m)
    plan = work(layout, tiles, device)
    query = query.contiguous()
    start, length = layout.start_on(device), length.to(device)
    if query_positions is not None:
        query_positions = query_positions.contiguous()

    out = query.new_empty(batch, steps, kv_heads * group, value_size)
    if logsumexp is None:
        logsumexp = query.new_empty(out.shape[:-1], dtype=torch.float32)
    partial_out = query.new_empty(plan.count, rows, value_size, dtype=torch.float32)
    partial_lse = query.new_empty(plan.count, rows, dtype=torch.float32)
    if plan.count:
        attend_kernel[(plan.count, tiles)](
            query,
            keys,
            values,
            positions,
            query_positions,
            start,
            length,
            plan.items,
            partial_out,
            partial_lse,
            scaling,
            softcap,
            plan.chunk,
            kv_heads,
            rows,
            steps,
            head_size,
            value_size,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_D=block_d(head_size),
            BLOCK_DV=block_d(value_size),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    join(partial_out, partial_lse, plan.first, out, logsumexp, kv_heads=kv_heads, s_aux=s_aux)
    if mass is not None and plan.count:
        add_mass(
            mass,
            mass_weight,
            query,
            keys,
            positions,
            query_positions,
            start,
            length,
            plan,
            logsumexp,
            scaling=scaling,
            softcap=softcap,
        )
    return out
