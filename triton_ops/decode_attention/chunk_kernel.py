"""What all kernels of decode attention do: find their chunk, load queries, attend to the chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from ..fp8.kernel import decode
from ..tiles import NOTHING, load_rows, tile_logits


@triton.jit
def load_chunk(items, program, start, length, chunk):
    """Read what a program works on: head, first slot, end of the used slots, third number."""
    item = items + 3 * program
    head = tl.load(item)
    offset = tl.load(item + 1)
    begin = tl.load(start + head) + offset
    held = tl.minimum(chunk, tl.load(length + head) - offset)
    return head, begin, begin + held, tl.load(item + 2)


@triton.jit
def load_queries(
    query, head, first, rows, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load `BLOCK_M` of the `rows` queries of a head: number, place, which exist, and the tile."""
    row = first + tl.arange(0, BLOCK_M)
    real = row < rows
    place = head.to(tl.int64) * rows + row
    return row, place, real, load_rows(query, place, real, D, BLOCK_D)


@triton.jit
def load_scales(scales, stride, slot, used):
    """Load the scales of some slots; None where there are none."""
    found = None
    if scales is not None:
        at = scales + slot.to(tl.int64) * stride
        found = tl.load(at, mask=used, other=0.0).to(tl.float32)
    return found


@triton.jit
def load_pool(
    base,
    scales,
    slot,
    used,
    TYPE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr = 0,
):
    """Load rows of a pool; those that have scales are codes, decoded to a type, not scaled yet."""
    found = load_rows(base, slot, used, SIZE, BLOCK, FIRST)
    if scales is not None:
        found = decode(found, TYPE)
    return found


@triton.jit
def attend_chunk(
    q,
    q_rest,
    asking,
    keys,
    values,
    positions,
    key_scales,
    value_scales,
    scales_stride,
    begin,
    end,
    scale,
    softcap,
    D: tl.constexpr,
    STRIDE_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Softmax of a tile of queries over slots `begin` to `end - 1`: output and log2 of its sum.

    Without values, the first tile of a key is its value.
    """
    top = tl.full([BLOCK_M], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        used = slot < end
        k = load_pool(keys, key_scales, slot, used, q.dtype, D, BLOCK_D)
        k_rest = None
        if BLOCK_REST > 0:
            k_rest = load_pool(keys, key_scales, slot, used, q.dtype, D, BLOCK_REST, BLOCK_D)
        key_scale = load_scales(key_scales, scales_stride, slot, used)
        logits = tile_logits(q, k, scale, softcap, q_rest, k_rest, key_scale)
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
        v = k
        if values is not None:
            v = load_pool(values, value_scales, slot, used, q.dtype, STRIDE_V, BLOCK_DV)
        value_scale = load_scales(value_scales, scales_stride, slot, used)
        if value_scale is not None:
            weights *= value_scale[None, :]
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
