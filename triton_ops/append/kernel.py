"""Kernel of `append`: one program for each head, of keys and values and of queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launcher
from ..tiles import block_d


@triton.jit
def append_token(
    head,
    heads,
    pool_keys,
    pool_values,
    positions,
    start,
    length,
    keys,
    values,
    column,
    key_row,
    key_head,
    value_row,
    value_head,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Write the token of one head, and count it."""
    row, number = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    held = tl.load(length + head)
    slot = tl.load(start + head) + held
    tl.store(positions + slot, column.to(tl.int32))
    place = tl.arange(0, BLOCK_D)
    key = tl.load(keys + row * key_row + number * key_head + place, mask=place < D)
    tl.store(pool_keys + slot * D + place, key, mask=place < D)
    if values is not None:
        place = tl.arange(0, BLOCK_DV)
        value = tl.load(values + row * value_row + number * value_head + place, mask=place < DV)
        tl.store(pool_values + slot * DV + place, value, mask=place < DV)
    # All threads have read the length before one of them changes it.
    tl.debug_barrier()
    tl.store(length + head, held + 1)


@triton.jit
def append_query(
    head,
    heads,
    ring,
    query,
    column,
    places,
    query_row,
    query_head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the query of one head to the place of its column."""
    row, number = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    place = tl.arange(0, BLOCK_D)
    asked = tl.load(query + row * query_row + number * query_head + place, mask=place < D)
    slot = head.to(tl.int64) * places + column % places
    tl.store(ring + slot * D + place, asked, mask=place < D)


@triton.jit(do_not_specialize=["column", "places", "programs"])
def append_kernel(
    pool_keys,
    pool_values,
    positions,
    start,
    length,
    keys,
    values,
    clock,
    column,
    programs,
    heads,
    key_row,
    key_head,
    value_row,
    value_head,
    ring,
    query,
    places,
    query_heads,
    query_row,
    query_head,
    D: tl.constexpr,
    DV: tl.constexpr,
    DQ: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_DQ: tl.constexpr,
):
    """The first `programs` write tokens; the others, if there is a ring, queries."""
    program = tl.program_id(0)
    if clock is not None:
        column = tl.load(clock)
    if program < programs:
        append_token(
            program, heads, pool_keys, pool_values, positions, start, length, keys, values, column,
            key_row, key_head, value_row, value_head, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    else:
        if ring is not None:
            append_query(
                program - programs, query_heads, ring, query, column, places,
                query_row, query_head, DQ, BLOCK_DQ,
            )  # fmt: skip


@launcher
def append_triton(
    pool: tuple[torch.Tensor, ...],
    start: torch.Tensor,
    length: torch.Tensor,
    new: tuple[torch.Tensor, ...],
    column: torch.Tensor | int,
    asked: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """See `triton_ops.append.append`."""
    batch, heads = length.shape
    keys, values = _rows(new[0]), _rows(new[-1])
    two = len(new) > 1
    on_device = isinstance(column, torch.Tensor)
    key_stride, value_stride = keys.stride(), values.stride()
    ring: tuple[object, ...] = (None,) * 6
    queries, size = 0, 1
    if asked is not None:
        query = _rows(asked[1])
        queries, places, size = asked[0].shape[1:]
        ring = (asked[0], query, places, queries, query.stride(0), query.stride(1))
    append_kernel[(batch * (heads + queries),)](
        pool[0],
        pool[1] if two else None,
        pool[-1],
        start,
        length,
        keys,
        values if two else None,
        column if on_device else None,
        0 if on_device else column,
        batch * heads,
        heads,
        key_stride[0],
        key_stride[1],
        value_stride[0],
        value_stride[1],
        *ring,
        keys.shape[-1],
        values.shape[-1],
        size,
        BLOCK_D=block_d(keys.shape[-1]),
        BLOCK_DV=block_d(values.shape[-1]),
        BLOCK_DQ=block_d(size),
        num_warps=1,
    )


def _rows(new: torch.Tensor) -> torch.Tensor:
    """Of one token, strides of all axes but the last may be anything."""
    return new if new.stride(3) == 1 else new.contiguous()
