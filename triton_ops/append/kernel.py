"""Kernel of `append`: one program for each head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launcher
from ..tiles import block_d


@triton.jit(do_not_specialize=["column"])
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
    heads,
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
    head = tl.program_id(0)
    row, number = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    held = tl.load(length + head)
    slot = tl.load(start + head) + held
    if clock is not None:
        column = tl.load(clock)
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
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (new[0], new[-1]))
    two = len(new) > 1
    on_device = isinstance(column, torch.Tensor)
    key_stride, value_stride = keys.stride(), values.stride()
    append_kernel[(batch * heads,)](
        pool[0],
        pool[1] if two else None,
        pool[-1],
        start,
        length,
        keys,
        values if two else None,
        column if on_device else None,
        0 if on_device else column,
        heads,
        key_stride[0],
        key_stride[1],
        value_stride[0],
        value_stride[1],
        keys.shape[-1],
        values.shape[-1],
        BLOCK_D=block_d(keys.shape[-1]),
        BLOCK_DV=block_d(values.shape[-1]),
        num_warps=1,
    )
