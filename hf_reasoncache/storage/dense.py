"""From ragged storage to one tensor with a place for every column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from hf_reasoncache.storage.pool import RaggedPool
from hf_reasoncache.storage.prefix_tree import PrefixTree

Read = Callable[[Callable[[str], torch.Tensor]], torch.Tensor]
"""Keys or values of some tokens, from what copies a field of these by its name."""


def dense_tokens(pools: Sequence[RaggedPool], read: Read, columns: int) -> torch.Tensor:
    """Copy keys or values to `[B, H_kv, columns, D]`, each token to its column; zeros elsewhere."""
    batch, heads = pools[0].length.shape
    parts = []
    for pool in pools:
        slots, offset = pool.slots(torch.arange(batch, device="cpu"))
        row, head, index = (offset >= 0).nonzero(as_tuple=True)
        held = slots[row, head, index]
        place = (row, head, pool.take("positions", held).long())
        parts.append((place, read(partial(pool.take, slots=held))))
    found = parts[0][1]
    out = found.new_zeros(batch, heads, columns, *found.shape[1:])
    for place, found in parts:
        out[place] = found
    return out


def add_shared(out: torch.Tensor, tree: PrefixTree, name: str) -> torch.Tensor:
    """Copy what rows share into `out`, `[B, H_kv, columns, D]`."""
    for row, paths in enumerate(zip(tree.paths, tree.aside, strict=True)):
        for part in (*paths[0], *paths[1]):
            out[row, :, part.columns.long()] = part.read(name)
    return out
