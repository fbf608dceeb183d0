"""The prefix's share of the launch of `decode_attention`: tiles of queries of many rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ..decode_attention.chunk_kernel import attend_chunk, load_chunk, store_partial
from ..tiles import load_rows


@triton.jit
def attend_prefix(
    program,
    tile,
    query,
    keys,
    values,
    key_scales,
    value_scales,
    scales_stride,
    start,
    length,
    items,
    members,
    members_first,
    first,
    partial_out,
    partial_lse,
    scale,
    softcap,
    chunk,
    heads,
    rows,
    D: tl.constexpr,
    DV: tl.constexpr,
    STRIDE_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One chunk of one prefix head, read once for a tile of the queries of all its rows."""
    head, begin, end, number = load_chunk(items, program, start, length, chunk)
    begin_members = tl.load(members_first + head // heads)
    queries = (tl.load(members_first + head // heads + 1) - begin_members) * rows

    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = index < queries
    branch = tl.load(members + begin_members + index // rows, mask=real, other=0)
    own_head = branch * heads + head % heads
    row = index % rows
    place = own_head.to(tl.int64) * rows + row
    q = load_rows(query, place, real, D, BLOCK_D)
    q_rest = None
    if BLOCK_REST > 0:
        q_rest = load_rows(query, place, real, D, BLOCK_REST, BLOCK_D)

    # A tile beyond the queries of this prefix has nothing to read.
    end = tl.where(tile * BLOCK_M < queries, end, begin)
    out, lse = attend_chunk(
        q, q_rest, None, keys, values, None, key_scales, value_scales, scales_stride,
        begin, end, scale, softcap,
        D, STRIDE_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_REST, BLOCK_DV,
    )  # fmt: skip
    partial = tl.load(first + own_head, mask=real, other=0).to(tl.int64) + number
    store_partial(partial_out, partial_lse, partial * rows + row, real, out, lse, DV)
