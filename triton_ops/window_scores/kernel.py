"""Kernels of `window_scores`: the softmax sums of every query, then the scores of every key."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launcher
from ..tiles import LOG2_E, NOTHING, Tile, block_d, blocks, load_rows, tile_logits

FAR = tl.constexpr((1 << 31) - 1)
"""A position behind all others."""

PAST, ALL = tl.constexpr(1), tl.constexpr(2)
"""What queries see: the keys before the oldest one, or all; else those up to their own."""


@triton.jit
def load_keys(
    keys,
    key_positions,
    head,
    tokens,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load the tile of keys of this program, and their positions; -1 for filler."""
    index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    where = head.to(tl.int64) * tokens + index
    at = tl.load(key_positions + where, mask=index < tokens, other=-1)
    return load_rows(keys, where, at >= 0, D, BLOCK_D), at


@triton.jit
def present_queries(query_positions, row, window, BLOCK_A: tl.constexpr):
    """Position of the oldest query that a row has, and how many it has."""
    oldest = tl.full([], FAR, tl.int32)
    count = tl.zeros([], tl.int32)
    for begin in tl.range(0, window, BLOCK_A):
        a = begin + tl.arange(0, BLOCK_A)
        at = tl.load(query_positions + row * window + a, mask=a < window, other=-1).to(tl.int32)
        oldest = tl.minimum(oldest, tl.min(tl.where(at >= 0, at, FAR), 0))
        count += tl.sum((at >= 0).to(tl.int32), 0)
    return oldest, count


@triton.jit
def line_logits(
    queries,
    query_positions,
    oldest,
    k,
    at,
    head,
    heads,
    line,
    group,
    begin,
    window,
    scale,
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX: tl.constexpr,
    SEES: tl.constexpr,
):
    """Logits of some queries of one line (a query head, or the maximum of all), and who sees whom.

    Every query sees the keys up to its limit; a query that there is not, which may hold anything,
    sees none.
    """
    a = begin + tl.arange(0, BLOCK_A)
    where = query_positions + head // heads * window + a
    limit = tl.load(where, mask=a < window, other=-1).to(tl.int32)
    if SEES == PAST:
        limit = tl.where(limit >= 0, oldest - 1, -1)
    if SEES == ALL:
        limit = tl.where(limit >= 0, FAR, -1)
    first = head.to(tl.int64) * group
    if MAX:
        logits = tl.full([BLOCK_A, BLOCK_N], -float("inf"), tl.float32)
        for member in tl.range(0, group):
            q = load_rows(queries, (first + member) * window + a, limit >= 0, D, BLOCK_D)
            logits = tl.maximum(logits, tile_logits(q, k, scale, None))
    else:
        q = load_rows(queries, (first + line) * window + a, limit >= 0, D, BLOCK_D)
        logits = tile_logits(q, k, scale, None)
    return logits, (at >= 0)[None, :] & (at[None, :] <= limit[:, None]), a


@triton.jit(do_not_specialize=["heads", "window", "tokens"])
def sums_kernel(
    queries,
    keys,
    query_positions,
    key_positions,
    partial,
    heads,
    group,
    lines,
    window,
    tokens,
    scale,
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX: tl.constexpr,
    SEES: tl.constexpr,
):
    """Logsumexp of every query over one tile of keys."""
    head = tl.program_id(0)
    oldest, _ = present_queries(query_positions, head // heads, window, BLOCK_A)
    k, at = load_keys(keys, key_positions, head, tokens, D, BLOCK_N, BLOCK_D)
    base = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * lines * window
    for line in tl.range(0, lines):
        for begin in tl.range(0, window, BLOCK_A):
            logits, visible, a = line_logits(
                queries, query_positions, oldest, k, at, head, heads, line, group, begin, window,
                scale, D, BLOCK_A, BLOCK_N, BLOCK_D, MAX, SEES,
            )  # fmt: skip
            logits = tl.where(visible, logits, NOTHING)
            top = tl.max(logits, 1)
            total = tl.sum(tl.where(visible, tl.exp2(logits - top[:, None]), 0.0), 1)
            seen = total > 0.0
            lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) / LOG2_E, NOTHING)
            tl.store(partial + base + line * window + a, lse, mask=a < window)


@triton.jit(do_not_specialize=["heads", "window", "tokens"])
def scores_kernel(
    queries,
    keys,
    query_positions,
    key_positions,
    logsumexp,
    scores,
    heads,
    group,
    lines,
    window,
    tokens,
    scale,
    D: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX: tl.constexpr,
    SEES: tl.constexpr,
):
    """Probabilities of one tile of keys, on average over all queries and lines."""
    head = tl.program_id(0)
    oldest, count = present_queries(query_positions, head // heads, window, BLOCK_A)
    weight = 1.0 / (lines * tl.maximum(count, 1)).to(tl.float32)
    k, at = load_keys(keys, key_positions, head, tokens, D, BLOCK_N, BLOCK_D)
    score = tl.zeros([BLOCK_N], tl.float32)
    for line in tl.range(0, lines):
        for begin in tl.range(0, window, BLOCK_A):
            logits, visible, a = line_logits(
                queries, query_positions, oldest, k, at, head, heads, line, group, begin, window,
                scale, D, BLOCK_A, BLOCK_N, BLOCK_D, MAX, SEES,
            )  # fmt: skip
            inside = a < window
            where = (head.to(tl.int64) * lines + line) * window + a
            lse = tl.load(logsumexp + where, mask=inside, other=0.0) * LOG2_E
            # A query that there is not sees nothing, and exp2 of nothing is 0.
            score += tl.sum(tl.exp2(tl.where(visible, logits - lse[:, None], NOTHING)), 0)
    index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(scores + head.to(tl.int64) * tokens + index, score * weight, mask=index < tokens)


@launcher
def window_scores_triton(
    queries: torch.Tensor,
    keys: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scaling: float,
    *,
    group: str,
    sees: str,
) -> torch.Tensor:
    """See `triton_ops.window_scores.window_scores`."""
    rows, heads, members, window, size = queries.shape
    tokens = keys.shape[2]
    scores = keys.new_empty(rows, heads, tokens, dtype=torch.float32)
    if scores.numel() == 0:
        return scores
    lines = 1 if group == "max" else members
    queries, keys = queries.to(keys.dtype).contiguous(), keys.contiguous()
    query_positions, key_positions = query_positions.contiguous(), key_positions.contiguous()

    tile = Tile.of(keys.dtype, window, block_d(size))
    grid = (rows * heads, blocks(tokens, tile.n))
    partial = scores.new_empty(rows * heads, grid[1], lines * window)
    sizes = (heads, members, lines, window, tokens, scaling, size)
    shared = dict(
        BLOCK_A=tile.m,
        BLOCK_N=tile.n,
        BLOCK_D=block_d(size),
        MAX=group == "max",
        SEES={"causal": 0, "past": PAST.value, "all": ALL.value}[sees],
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    sums_kernel[grid](queries, keys, query_positions, key_positions, partial, *sizes, **shared)
    logsumexp = partial.logsumexp(1)
    scores_kernel[grid](
        queries, keys, query_positions, key_positions, logsumexp, scores, *sizes, **shared
    )
    return scores
