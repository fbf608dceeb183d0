"""Kernels of `compact`: pair every hole with a token to move, then move."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from ..launch import launcher
from ..tiles import blocks, power_of_two

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""A move copies bits, whatever they mean."""


@triton.jit(do_not_specialize=["tokens"])
def pair_kernel(slots, offset, keep, kept, sources, targets, moves, tokens, BLOCK: tl.constexpr):
    """List, for one head, the slots of tokens to move and of holes, in the order of the input."""
    head = tl.program_id(0)
    limit = tl.load(kept + head)
    base = head.to(tl.int64) * tokens
    found = tl.zeros([], tl.int32)
    free = tl.zeros([], tl.int32)
    for begin in tl.range(0, tokens, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        real = index < tokens
        slot = tl.load(slots + base + index, mask=real, other=0)
        at = tl.load(offset + base + index, mask=real, other=-1)
        stays = tl.load(keep + base + index, mask=real, other=0) != 0
        moved = (stays & (at >= limit)).to(tl.int32)
        hole = ((at >= 0) & (at < limit) & (stays == 0)).to(tl.int32)
        tl.store(sources + base + found + tl.cumsum(moved, 0) - 1, slot, mask=moved != 0)
        tl.store(targets + base + free + tl.cumsum(hole, 0) - 1, slot, mask=hole != 0)
        found += tl.sum(moved, 0)
        free += tl.sum(hole, 0)
    tl.store(moves + head, found)


@triton.jit(do_not_specialize=["tokens"])
def move_kernel(
    field,
    sources,
    targets,
    moves,
    tokens,
    size,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Copy some of one head's moves; a source is never a target, so order does not matter."""
    head = tl.program_id(0)
    index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = index < tl.load(moves + head)
    at = head.to(tl.int64) * tokens + index
    source = tl.load(sources + at, mask=real, other=0)
    target = tl.load(targets + at, mask=real, other=0)
    for begin in tl.range(0, size, BLOCK_E):
        element = begin + tl.arange(0, BLOCK_E)
        inside = real[:, None] & (element < size)[None, :]
        found = tl.load(field + source[:, None] * size + element[None, :], mask=inside, other=0)
        tl.store(field + target[:, None] * size + element[None, :], found, mask=inside)


@launcher
def pair(
    slots: torch.Tensor, offset: torch.Tensor, keep: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Say which slots of every head move where, and how many: LongTensor[R, H, N] twice, [R, H].

    Only as many entries are written as a head has moves.
    """
    rows, heads, tokens = slots.shape
    sources, targets = torch.empty_like(slots), torch.empty_like(slots)
    moves, mask = torch.empty_like(kept), keep.contiguous().view(torch.uint8)
    arguments = (slots, offset, mask, kept, sources, targets, moves, tokens)
    pair_kernel[(rows * heads,)](*arguments, BLOCK=512, num_warps=4)
    return sources, targets, moves


@launcher
def compact_triton(
    fields: Iterable[torch.Tensor], slots: torch.Tensor, offset: torch.Tensor, keep: torch.Tensor
) -> None:
    """See `triton_ops.compact.compact`."""
    rows, heads, tokens = slots.shape
    if 0 in slots.shape:
        return
    sources, targets, moves = pair(slots.contiguous(), offset.contiguous(), keep, keep.sum(-1))
    for field in fields:
        bits = field.view(BITS[field.dtype.itemsize])
        size = field.shape[1:].numel()
        width = min(256, power_of_two(size))
        block = min(1024, 4096 // width)
        move_kernel[(rows * heads, blocks(tokens, block))](
            bits,
            sources,
            targets,
            moves,
            tokens,
            size,
            BLOCK_N=block,
            BLOCK_E=width,
            num_warps=4,
        )
