"""Kernels that find the pools of several layers by their addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..compact.kernel import BITS, pair
from ..launch import launcher
from ..tiles import blocks, power_of_two

if TYPE_CHECKING:
    from . import HeadsOfPools, Pools

FILLER = tl.constexpr((1 << 63) - 1)
"""Comes last when positions are sorted."""

WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def head_of(table, head, count):
    """Pool of a head, its place there, its first slot, and the slots that it uses."""
    pool = tl.load(table + head)
    place = tl.load(table + count + head)
    start = tl.load(table + 2 * count + head)
    return pool, place, start, tl.load(table + 3 * count + head)


@triton.jit(do_not_specialize=["heads", "tokens"])
def order_kernel(addresses, table, first, packed, heads, tokens, BLOCK: tl.constexpr):
    """Pack positions and offsets of one head's tokens, so that sorting orders both."""
    head, count = tl.program_id(0), tl.num_programs(0)
    pool, _, start, used = head_of(table, head, count)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    field = tl.load(addresses + pool).to(tl.pointer_type(tl.int32))
    at = tl.load(field + start + index, mask=index < used, other=0).to(tl.int64)
    at -= tl.load(first + head // heads)
    pair = tl.where(index < used, (at << 32) | index.to(tl.int64), FILLER)
    tl.store(packed + head.to(tl.int64) * tokens + index, pair, mask=index < tokens)


@triton.jit(do_not_specialize=["size"])
def unpack_kernel(packed, positions, offset, valid, size, BLOCK: tl.constexpr):
    """Undo `order_kernel`."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(packed + index, mask=index < size, other=FILLER)
    real = pair != FILLER
    tl.store(positions + index, tl.where(real, pair >> 32, -1), mask=index < size)
    tl.store(offset + index, tl.where(real, pair & 0xFFFFFFFF, -1), mask=index < size)
    tl.store(valid + index, real.to(tl.uint8), mask=index < size)


@triton.jit(do_not_specialize=["tokens"])
def gather_kernel(
    addresses,
    table,
    offset,
    out,
    tokens,
    size,
    WORD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Copy a field of some tokens of one head; zeros for filler."""
    head, count = tl.program_id(0), tl.num_programs(0)
    pool, _, start, _ = head_of(table, head, count)
    field = tl.load(addresses + pool).to(tl.pointer_type(WORD))
    index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    to = head.to(tl.int64) * tokens + index
    place = tl.load(offset + to, mask=index < tokens, other=-1)
    slot = start + place
    for begin in tl.range(0, size, BLOCK_E):
        element = begin + tl.arange(0, BLOCK_E)
        inside = (element < size)[None, :]
        real = (place >= 0)[:, None] & inside
        found = tl.load(field + slot[:, None] * size + element[None, :], mask=real, other=0)
        target = out + to[:, None] * size + element[None, :]
        tl.store(target, found, mask=(index < tokens)[:, None] & inside)


@triton.jit(do_not_specialize=["tokens"])
def scatter_kernel(
    addresses, table, offset, numbers, tokens, WORD: tl.constexpr, BLOCK: tl.constexpr
):
    """Write one number for each of some tokens of one head."""
    head, count = tl.program_id(0), tl.num_programs(0)
    pool, _, start, _ = head_of(table, head, count)
    field = tl.load(addresses + pool).to(tl.pointer_type(WORD))
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = head.to(tl.int64) * tokens + index
    place = tl.load(offset + at, mask=index < tokens, other=-1)
    number = tl.load(numbers + at, mask=index < tokens, other=0)
    tl.store(field + start + place, number, mask=place >= 0)


@triton.jit(do_not_specialize=["tokens", "pools"])
def move_kernel(
    addresses,
    sizes,
    table,
    sources,
    targets,
    moves,
    tokens,
    pools,
    WORD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Copy some of one head's moves in one field; a source is never a target."""
    head, count = tl.program_id(0), tl.num_programs(0)
    pool, _, start, _ = head_of(table, head, count)
    index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    kind = tl.program_id(2)
    size = tl.load(sizes + kind)
    field = tl.load(addresses + kind * pools + pool).to(tl.pointer_type(WORD))
    real = index < tl.load(moves + head)
    at = head.to(tl.int64) * tokens + index
    source = start + tl.load(sources + at, mask=real, other=0)
    target = start + tl.load(targets + at, mask=real, other=0)
    for begin in tl.range(0, size, BLOCK_E):
        element = begin + tl.arange(0, BLOCK_E)
        inside = real[:, None] & (element < size)[None, :]
        found = tl.load(field + source[:, None] * size + element[None, :], mask=inside, other=0)
        tl.store(field + target[:, None] * size + element[None, :], found, mask=inside)


@triton.jit(do_not_specialize=["pools", "lengths"])
def finish_kernel(
    addresses,
    sizes,
    cleared,
    table,
    kept,
    pools,
    lengths,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write zeros to the slots that one head no longer uses in one field, and count the others.

    The last program along the third axis counts.
    """
    head, count = tl.program_id(0), tl.num_programs(0)
    pool, place, start, used = head_of(table, head, count)
    stays = tl.load(kept + head)
    if tl.program_id(2) == tl.num_programs(2) - 1:
        if tl.program_id(1) == 0:
            length = tl.load(addresses + lengths * pools + pool).to(tl.pointer_type(tl.int64))
            tl.store(length + place, stays)
    else:
        kind = tl.load(cleared + tl.program_id(2))
        size = tl.load(sizes + kind)
        field = tl.load(addresses + kind * pools + pool).to(tl.pointer_type(WORD))
        begin, end = (start + stays) * size, (start + used) * size
        at = begin + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(field + at, tl.zeros([BLOCK], WORD), mask=at < end)


@launcher
def read_positions(
    pools: Pools, table: torch.Tensor, first: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `HeadsOfPools.read`: positions, offsets and which are no filler."""
    _, rows, heads = table.shape
    packed = table.new_empty(rows, heads, tokens)
    order_kernel[(rows * heads, blocks(tokens, 1024))](
        pools.of_field("positions"), table, first, packed, heads, tokens, BLOCK=1024, num_warps=4
    )
    packed = packed.sort(dim=-1).values
    positions, offset = torch.empty_like(packed), torch.empty_like(packed)
    valid = torch.empty_like(packed, dtype=torch.uint8)
    unpack_kernel[(blocks(packed.numel(), 1024),)](
        packed, positions, offset, valid, packed.numel(), BLOCK=1024, num_warps=4
    )
    return positions, offset, valid.view(torch.bool)


def gather(held: HeadsOfPools, name: str) -> torch.Tensor:
    """See `HeadsOfPools.field`."""
    (dtype, shape), (rows, heads, tokens) = held.pools.kinds[name], held.offset.shape
    out = held.offset.new_empty(rows, heads, tokens, *shape, dtype=dtype)
    bits = out.view(BITS[dtype.itemsize])
    size = shape.numel()
    width = min(256, power_of_two(size))
    block = min(1024, 2048 // width)
    gather_kernel[(rows * heads, blocks(tokens, block))](
        held.pools.of_field(name),
        held.table,
        held.offset,
        bits,
        tokens,
        size,
        WORD=WORDS[dtype.itemsize],
        BLOCK_N=block,
        BLOCK_E=width,
        num_warps=4,
    )
    return out


@launcher
def scatter(held: HeadsOfPools, name: str, numbers: torch.Tensor) -> None:
    """See `HeadsOfPools.write`."""
    rows, heads, tokens = held.offset.shape
    numbers = numbers.contiguous()
    bits = numbers.view(BITS[numbers.dtype.itemsize])
    scatter_kernel[(rows * heads, blocks(tokens, 1024))](
        held.pools.of_field(name),
        held.table,
        held.offset,
        bits,
        tokens,
        WORD=WORDS[numbers.dtype.itemsize],
        BLOCK=1024,
        num_warps=4,
    )


@launcher
def compact_heads(held: HeadsOfPools, keep: torch.Tensor, kept: torch.Tensor) -> None:
    """See `HeadsOfPools.compact`."""
    pools, (rows, heads, tokens) = held.pools, held.offset.shape
    # Offsets stand for slots: the pools are found later.
    sources, targets, moves = pair(held.offset, held.offset, keep, kept)
    fields, count = len(pools.kinds), pools.addresses.shape[1]
    word = WORDS[pools.word_bytes]
    width = min(256, power_of_two(max(pools.words(name) for name in pools.kinds)))
    block = min(1024, 4096 // width)
    move_kernel[(rows * heads, blocks(tokens, block), fields)](
        pools.addresses,
        pools.sizes,
        held.table,
        sources,
        targets,
        moves,
        tokens,
        count,
        WORD=word,
        BLOCK_N=block,
        BLOCK_E=width,
        num_warps=4,
    )
    most = max([pools.words(name) for name in pools.statistics], default=1)
    finish_kernel[(rows * heads, blocks(tokens * most, 1024), len(pools.statistics) + 1)](
        pools.addresses,
        pools.sizes,
        pools.cleared,
        held.table,
        kept,
        count,
        fields,
        WORD=word,
        BLOCK=1024,
        num_warps=4,
    )
