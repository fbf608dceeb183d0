"""Kernel of `append`: one program for each head."""

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


@triton.jit(do_not_specialize=["column"])
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
    heads,
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
    head = tl.program_id(0)
    row, number = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    held = tl.load(length + head)
    slot = tl.load(start + head) + held
    if clock is not None:
        column = tl.load(clock)
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


@launcher
def append_triton(
    pool: tuple[torch.Tensor, ...],
    start: torch.Tensor,
    length: torch.Tensor,
    new: tuple[torch.Tensor, ...],
    column: torch.Tensor | int,
) -> None:
    """See `triton_ops.append.append`."""
    batch, heads = length.shape
    # Of one token, strides of the other axes may be anything.
    rows = [x if x.stride(3) == 1 else x.contiguous() for x in new]
    missing = 3 - len(new)
    strides = [stride for x in rows for stride in x.stride()[:2]] + [0, 0] * missing
    sizes = [x.shape[3] for x in rows] + [1] * missing
    on_device = isinstance(column, torch.Tensor)
    append_kernel[(batch * heads,)](
        *pool[:-1],
        *[None] * missing,
        pool[-1],
        start,
        length,
        *rows,
        *[None] * missing,
        column if on_device else None,
        0 if on_device else column,
        heads,
        *strides,
        *sizes,
        *map(power_of_two, sizes),
        num_warps=1,
    )
