"""Kernel of `append`: one program for each head, of keys and values and of queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launcher
from ..tiles import power_of_two


@triton.jit
def copy_row(source, target, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy `SIZE` numbers."""
    place = tl.arange(0, BLOCK)
    found = tl.load(source + place, mask=place < SIZE)
    tl.store(target + place, found, mask=place < SIZE)


@triton.jit
def append_token(
    head,
    heads,
    pool_keys,
    pool_values,
    pool_scales,
    positions,
    start,
    length,
    keys,
    values,
    scales,
    column,
    key_row,
    key_head,
    value_row,
    value_head,
    scale_row,
    scale_head,
    D: tl.constexpr,
    DV: tl.constexpr,
    DS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_DS: tl.constexpr,
):
    """Write the token of one head, and count it."""
    row, number = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    held = tl.load(length + head)
    slot = tl.load(start + head) + held
    tl.store(positions + slot, column.to(tl.int32))
    copy_row(keys + row * key_row + number * key_head, pool_keys + slot * D, D, BLOCK_D)
    if values is not None:
        value = values + row * value_row + number * value_head
        copy_row(value, pool_values + slot * DV, DV, BLOCK_DV)
    if scales is not None:
        scale = scales + row * scale_row + number * scale_head
        copy_row(scale, pool_scales + slot * DS, DS, BLOCK_DS)
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
    slot = head.to(tl.int64) * places + column % places
    copy_row(query + row * query_row + number * query_head, ring + slot * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["column", "places", "programs"])
def append_kernel(
    pool_keys,
    pool_values,
    pool_scales,
    positions,
    start,
    length,
    keys,
    values,
    scales,
    clock,
    column,
    programs,
    heads,
    key_row,
    key_head,
    value_row,
    value_head,
    scale_row,
    scale_head,
    ring,
    query,
    places,
    query_heads,
    query_row,
    query_head,
    D: tl.constexpr,
    DV: tl.constexpr,
    DS: tl.constexpr,
    DQ: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_DS: tl.constexpr,
    BLOCK_DQ: tl.constexpr,
):
    """The first `programs` write tokens; the others, if there is a ring, queries."""
    program = tl.program_id(0)
    if clock is not None:
        column = tl.load(clock)
    if program < programs:
        append_token(
            program, heads, pool_keys, pool_values, pool_scales, positions, start, length,
            keys, values, scales, column, key_row, key_head, value_row, value_head,
            scale_row, scale_head, D, DV, DS, BLOCK_D, BLOCK_DV, BLOCK_DS,
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
    missing = 3 - len(new)
    rows = [*map(_rows, new)]
    strides = [stride for x in rows for stride in x.stride()[:2]] + [0, 0] * missing
    sizes = [x.shape[3] for x in rows] + [1] * missing
    on_device = isinstance(column, torch.Tensor)
    ring: tuple[object, ...] = (None,) * 6
    queries, size = 0, 1
    if asked is not None:
        query = _rows(asked[1])
        queries, places, size = asked[0].shape[1:]
        ring = (asked[0], query, places, queries, query.stride(0), query.stride(1))
    sizes.append(size)
    append_kernel[(batch * (heads + queries),)](
        *pool[:-1],
        *[None] * missing,
        pool[-1],
        start,
        length,
        *rows,
        *[None] * missing,
        column if on_device else None,
        0 if on_device else column,
        batch * heads,
        heads,
        *strides,
        *ring,
        *sizes,
        *map(power_of_two, sizes),
        num_warps=1,
    )


def _rows(new: torch.Tensor) -> torch.Tensor:
    """Of one token, strides of all axes but the last may be anything."""
    return new if new.stride(3) == 1 else new.contiguous()
