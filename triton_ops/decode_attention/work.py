"""How the kernels split a ragged pool into programs, decided from capacities alone.

Capacities are known to the host and change at evictions only. Between two evictions the list of
work is one tensor on the device, the grid is fixed, and lengths are read on the device: nothing
waits for the GPU, and a captured graph stays valid while the heads grow.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass

import torch

from ..launch import send
from ..layout import RaggedLayout, SharedPrefix
from ..tiles import blocks

SMALLEST, STEP = 32, 64
"""Slots of the smallest chunk, half a tile of keys, and what others are a multiple of."""

LARGEST = 512
"""Slots of the largest chunk while the queries of a head fit one tile and there are few programs:
equal pieces keep ragged heads in balance, and partial results cost at most 2 % of the traffic of
the keys and values."""

ROOMY = 4
"""Largest chunks grow to so many times their size where there are still so many times the programs
that fill a GPU: what one of them is longer than the others matters less then."""

PROGRAMS = 264
"""Programs that fill a GPU: two for each of the 132 multiprocessors of an H100 or H200."""


@dataclass(frozen=True, eq=False)
class PrefixWork:
    """Chunks of shared prefixes; every row of a prefix gets a partial result of each chunk.

    Attributes
    ----------
    chunk : int
        Slots per chunk.
    items : IntTensor[n, 3]
        Flat head index in the prefix's layout, offset of the chunk in its head, and its number: the
        partial result is that much behind the first one of a row's head.
    start, length : LongTensor[P, H_kv]
        First slot, and slots in use.
    members, first : IntTensor[B], IntTensor[P + 1]
        See `SharedPrefix`.
    """

    chunk: int
    items: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    members: torch.Tensor
    first: torch.Tensor

    @property
    def count(self) -> int:
        """Number of chunks."""
        return self.items.shape[0]


@dataclass(frozen=True, eq=False)
class Work:
    """Chunks of all heads, and where the partial result of each belongs.

    Attributes
    ----------
    chunk : int
        Slots per chunk.
    items : IntTensor[n, 3]
        Flat head index, offset of the chunk in its head, index of the partial result.
    first : IntTensor[heads + 1]
        Partial results `first[i]` to `first[i + 1] - 1` belong to head `i`, those of its prefix
        first.
    partials : int
        Number of partial results.
    arrivals : IntTensor[heads] or None
        How many programs of a head have written theirs in the launch that runs; zeros between two.
        None with a prefix, whose programs write partial results of many heads.
    prefix : PrefixWork or None
    """

    chunk: int
    items: torch.Tensor
    first: torch.Tensor
    partials: int
    arrivals: torch.Tensor | None
    prefix: PrefixWork | None

    @property
    def count(self) -> int:
        """Number of chunks, without those of prefixes."""
        return self.items.shape[0]

    def copy_(self, other: Work) -> None:
        """Take over the chunks of another list of the same length."""
        self.items.copy_(other.items)
        self.first.copy_(other.first)


def counts(layout: RaggedLayout, chunk: int) -> torch.Tensor:
    """LongTensor[heads]: chunks of every head, on the CPU."""
    return (layout.capacity.flatten() + chunk - 1) // chunk


def chunk_size(layout: RaggedLayout, tiles: int) -> int:
    """Return the largest chunk that still gives every multiprocessor work, in equal pieces.

    Parameters
    ----------
    layout : RaggedLayout
    tiles : int
        Programs per chunk, one per tile of queries. With several, chunks may be longer: there are
        programs enough, and each chunk costs a partial result per query.
    """
    heads = Counter(layout.capacity.flatten().tolist())
    if layout.movable:
        # The same for all shares of the slots: that of equal ones.
        heads = Counter({blocks(layout.slots, layout.capacity.numel()): layout.capacity.numel()})

    def programs(size: int) -> int:
        return tiles * sum(count * blocks(capacity, size) for capacity, count in heads.items())

    def largest(limit: int, least: int) -> int:
        sizes = (SMALLEST, *range(STEP, limit + 1, STEP))
        return sizes[max(bisect_right(sizes, -least, key=lambda size: -programs(size)) - 1, 0)]

    chunk = largest(LARGEST * tiles, PROGRAMS)
    if chunk == LARGEST * tiles:
        chunk = max(chunk, largest(ROOMY * LARGEST * tiles, ROOMY * PROGRAMS))
    # As many chunks of the longest head, all of them equally long.
    longest = max(heads)
    even = blocks(longest, max(blocks(longest, chunk), 1))
    return min(chunk, max(blocks(even, STEP), 1) * STEP)


def work(
    layout: RaggedLayout,
    tiles: int,
    device: torch.device,
    prefix: SharedPrefix | None = None,
    prefix_tiles: int = 1,
) -> Work:
    """Return the work for a layout, made once per layout.

    Parameters
    ----------
    layout : RaggedLayout
    tiles, prefix_tiles : int
        Tiles of queries that read a head of the layout, and one of the prefix.
    device : device
    prefix : SharedPrefix, optional
        What the rows read besides their own tokens.
    """

    def make(layout: RaggedLayout) -> Work:
        return _make_work(layout, tiles, device, prefix, prefix_tiles)

    return layout.derive(("work", tiles, device, prefix, prefix_tiles), make)


def _make_work(
    layout: RaggedLayout,
    tiles: int,
    device: torch.device,
    prefix: SharedPrefix | None,
    prefix_tiles: int,
) -> Work:
    chunk = chunk_size(layout, tiles)
    own = counts(layout, chunk)
    shared, arrivals, before = None, None, torch.zeros_like(own)
    if prefix is None:
        # A head without slots has a result too.
        own = own.clamp_min(1)
        arrivals = send(torch.zeros_like(own, dtype=torch.int32), device)
    else:
        shared = _prefix_work(prefix, prefix_tiles, device)
        per_prefix = counts(prefix.layout, shared.chunk).view_as(prefix.length)
        before = per_prefix[prefix.owner].flatten()
    if layout.movable:
        # As many as the worst shares need; what is too much lies behind a head's last slot.
        own[: layout.slots // chunk + len(own) - int(own.sum())] += 1
    first = torch.cat([own.new_zeros(1), (own + before).cumsum(0)])
    head, ordinal = _enumerate(own)
    items = torch.stack([head, ordinal * chunk, first[head] + before[head] + ordinal], dim=1)
    # Longest first: what is left over at the end of a head fills the gaps at the end.
    long = (layout.capacity.flatten()[head] - ordinal * chunk).clamp_max(chunk)
    items = items[long.argsort(descending=True, stable=True)]
    return Work(
        chunk=chunk,
        items=send(items.int(), device),
        first=send(first.int(), device),
        partials=int(first[-1]),
        arrivals=arrivals,
        prefix=shared,
    )


def _prefix_work(prefix: SharedPrefix, tiles: int, device: torch.device) -> PrefixWork:
    chunk = chunk_size(prefix.layout, tiles)
    head, ordinal = _enumerate(counts(prefix.layout, chunk))
    return PrefixWork(
        chunk=chunk,
        items=send(torch.stack([head, ordinal * chunk, ordinal], dim=1).int(), device),
        start=prefix.layout.start_on(device),
        length=send(prefix.length, device),
        members=send(prefix.members.int(), device),
        first=send(prefix.first.int(), device),
    )


def _enumerate(per_head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Head and number within the head of each of `per_head` chunks."""
    device = per_head.device
    head = torch.arange(per_head.numel(), device=device).repeat_interleave(per_head)
    first = per_head.cumsum(0) - per_head
    return head, torch.arange(head.numel(), device=device) - first[head]
