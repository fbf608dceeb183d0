"""How the kernels split a ragged pool into programs, decided from capacities alone.

Capacities are known to the host and change at evictions only. Between two evictions the list of
work is one tensor on the device, the grid is fixed, and lengths are read on the device: nothing
waits for the GPU, and a captured graph stays valid while the heads grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from triton_ops.layout import RaggedLayout

SMALLEST = 64
"""Slots of the smallest chunk: one tile of keys."""

LARGEST = 512
"""Slots of the largest chunk while the queries of a head fit one tile: equal pieces keep ragged
heads in balance, and partial results cost at most 2 % of the traffic of the keys and values."""

PROGRAMS = 264
"""Programs that fill a GPU: two for each of the 132 multiprocessors of an H100 or H200."""


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
        Partial results `first[i]` to `first[i + 1] - 1` belong to head `i`.
    """

    chunk: int
    items: torch.Tensor
    first: torch.Tensor

    @property
    def count(self) -> int:
        """Number of chunks, and of partial results."""
        return self.items.shape[0]


def counts(layout: RaggedLayout, chunk: int) -> torch.Tensor:
    """LongTensor[heads]: chunks of every head, on the CPU."""
    return (layout.capacity.flatten() + chunk - 1) // chunk


def chunk_size(layout: RaggedLayout, tiles: int) -> int:
    """Return the largest chunk that still gives every multiprocessor work.

    Parameters
    ----------
    layout : RaggedLayout
    tiles : int
        Programs per chunk, one per tile of queries. With several, chunks may be longer: there are
        programs enough, and each chunk costs a partial result per query.
    """
    chunk = SMALLEST
    while chunk < LARGEST * tiles and int(counts(layout, 2 * chunk).sum()) * tiles >= PROGRAMS:
        chunk *= 2
    return chunk


def work(layout: RaggedLayout, tiles: int, device: torch.device) -> Work:
    """Return the work for a layout, made once per layout."""

    def make() -> Work:
        chunk = chunk_size(layout, tiles)
        return _split(counts(layout, chunk), chunk, device)

    return layout.derive(("work", tiles, device), make)


def _split(per_head: torch.Tensor, chunk: int, device: torch.device) -> Work:
    first = torch.cat([per_head.new_zeros(1), per_head.cumsum(0)])
    head = torch.arange(per_head.numel()).repeat_interleave(per_head)
    partial = torch.arange(head.numel())
    items = torch.stack([head, (partial - first[head]) * chunk, partial], dim=1)
    return Work(chunk, items.int().to(device), first.int().to(device))
