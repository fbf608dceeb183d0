"""Kernels of `redundancy`: norms and sums, the search for the newest repeat, the column means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launcher
from ..tiles import Tile, block_d, blocks, dot_rows, load_rows
from . import places

NONE = tl.constexpr(places.NONE)
UNSEEN = tl.constexpr(places.UNSEEN)


@triton.jit(do_not_specialize=["tokens"])
def units_kernel(
    keys,
    valid,
    known,
    inverse,
    sums,
    ends,
    tokens,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Inverse norms of a tile of keys, 0 for a zero key, the sum of the tile's unit keys, and the
    end of those that have been compared with each other.
    """
    head = tl.program_id(0)
    index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = index < tokens
    where = head.to(tl.int64) * tokens + index
    held = tl.load(valid + where, mask=inside, other=0) != 0
    old = tl.load(known + where, mask=held, other=UNSEEN) != UNSEEN
    k = load_rows(keys, where, held, D, BLOCK_D).to(tl.float32)
    norm = tl.sqrt(tl.sum(k * k, 1))
    scale = tl.where(norm > 0.0, 1.0 / tl.where(norm > 0.0, norm, 1.0), 0.0)
    tl.store(inverse + where, scale, mask=inside)
    column = tl.arange(0, BLOCK_D)
    tile = head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    total = tl.sum(k * scale[:, None], 0)
    tl.store(sums + tile * D + column, total, mask=column < D)
    tl.store(ends + tile, tl.max(tl.where(old, index + 1, 0), 0))


@triton.jit(do_not_specialize=["tokens"])
def search_kernel(
    keys,
    valid,
    inverse,
    known,
    compared,
    repeat,
    cosine,
    tokens,
    threshold,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Find the newest repeat of every key of a tile, `NONE` for none, and its cosine.

    Tiles of columns are scanned from the newest backwards until every row has its match; real keys
    share a large component and mostly match in the first tile. A row that knows its answer among
    the columns before `compared` looks at the others only.
    """
    head = tl.program_id(0)
    base = head.to(tl.int64) * tokens
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < tokens
    held = tl.load(valid + base + row, mask=inside, other=0) != 0
    scale = tl.load(inverse + base + row, mask=inside, other=0.0)
    match = tl.load(known + base + row, mask=held, other=UNSEEN).to(tl.int32)
    oldest = tl.where(match >= NONE, tl.load(compared + head), 0)
    match = tl.where(match >= NONE, match, NONE)
    tile = tl.cdiv(tokens, BLOCK_N) - 1
    open_rows = held & (oldest < tokens)
    while (tile >= 0) & (tl.max(open_rows.to(tl.int32), 0) > 0):
        # Loaded again for every tile: most searches end with the first one, and rows that stay in
        # registers over the loop make float32 spill.
        q = load_rows(keys, base + row, open_rows, D, BLOCK_D)
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        real = column < tokens
        exists = tl.load(valid + base + column, mask=real, other=0) != 0
        k = load_rows(keys, base + column, exists, D, BLOCK_D)
        other = tl.load(inverse + base + column, mask=real, other=0.0)
        cos = dot_rows(q, k) * scale[:, None] * other[None, :]
        new = (row[:, None] != column[None, :]) & (column[None, :] >= oldest[:, None])
        newest = tl.max(tl.where((cos > threshold) & new, column[None, :], -1), 1)
        match = tl.where(open_rows & (newest >= 0), newest, match)
        open_rows = open_rows & (newest < 0) & (tile * BLOCK_N > oldest)
        tile -= 1
    tl.store(repeat + base + row, match, mask=inside)
    found = held & (match >= 0)
    near = tl.load(inverse + base + match, mask=found, other=0.0)
    product = load_rows(keys, base + row, found, D, BLOCK_D).to(tl.float32)
    product *= load_rows(keys, base + match, found, D, BLOCK_D).to(tl.float32)
    tl.store(cosine + base + row, tl.sum(product, 1) * scale * near, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def means_kernel(
    keys,
    valid,
    inverse,
    total,
    count,
    repeat,
    cosine,
    means,
    tokens,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Column means of a tile: the sum of all cosines less the diagonal and what rows exempt.

    Every column looks through all rows' matches, which is cheap beside the search and, unlike
    atomic additions, adds in one order.
    """
    head = tl.program_id(0)
    base = head.to(tl.int64) * tokens
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < tokens
    held = tl.load(valid + base + column, mask=inside, other=0) != 0
    scale = tl.load(inverse + base + column, mask=inside, other=0.0)
    unit = load_rows(keys, base + column, held, D, BLOCK_D).to(tl.float32) * scale[:, None]
    place = tl.arange(0, BLOCK_D)
    sum_of_units = tl.load(total + head.to(tl.int64) * D + place, mask=place < D, other=0.0)
    mean = tl.sum(unit * sum_of_units[None, :], 1) - tl.sum(unit * unit, 1)
    for begin in tl.range(0, tokens, BLOCK_M):
        row = begin + tl.arange(0, BLOCK_M)
        match = tl.load(repeat + base + row, mask=row < tokens, other=NONE)
        value = tl.load(cosine + base + row, mask=row < tokens, other=0.0)
        mean -= tl.sum(tl.where(match[:, None] == column[None, :], value[:, None], 0.0), 0)
    among = tl.maximum(tl.load(count + head), 1).to(tl.float32)
    mean = tl.where(held, mean / among, 0.0)
    tl.store(means + base + column, mean, mask=inside)


@launcher
def redundancy_triton(
    keys: torch.Tensor, valid: torch.Tensor, *, threshold: float, known: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `triton_ops.redundancy.redundancy`."""
    rows, heads, tokens, size = keys.shape
    means = keys.new_empty(rows, heads, tokens, dtype=torch.float32)
    repeat = torch.empty_like(means, dtype=torch.long)
    if means.numel() == 0:
        return means, repeat
    keys, known = keys.contiguous(), known.contiguous()
    mask = valid.contiguous().view(torch.uint8)
    # A search without a known end is not pipelined, nor are its tiles in flight. Products of larger
    # tiles spill.
    if keys.dtype == torch.float32:
        tile = Tile(16, 16, 8, 1)
    elif block_d(size) > 128:
        tile = Tile(32 if block_d(size) == 256 else 16, 32, 4 if block_d(size) <= 512 else 8, 1)
    else:
        tile = Tile.of(keys.dtype, 64, block_d(size))
    columns = (rows * heads, blocks(tokens, tile.n))
    inverse, cosine = torch.empty_like(means), torch.empty_like(means)
    sums = means.new_empty(*columns, size)
    ends = means.new_empty(*columns, dtype=torch.long)
    shared = dict(BLOCK_N=tile.n, BLOCK_D=block_d(size), num_warps=tile.warps, num_stages=1)
    units_kernel[columns](keys, mask, known, inverse, sums, ends, tokens, size, **shared)
    compared = ends.amax(1)
    search_kernel[(rows * heads, blocks(tokens, tile.m))](
        keys,
        mask,
        inverse,
        known,
        compared,
        repeat,
        cosine,
        tokens,
        threshold,
        size,
        BLOCK_M=tile.m,
        **shared,
    )
    total, count = sums.sum(1), valid.sum(-1)
    arguments = (keys, mask, inverse, total, count, repeat, cosine, means, tokens, size)
    means_kernel[columns](*arguments, BLOCK_M=64, **shared)
    return means, repeat
