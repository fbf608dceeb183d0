"""From ragged storage to one tensor with a place for every column."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_reasoncache.storage.pool import RaggedPool
from hf_reasoncache.storage.prefix_tree import PrefixTree


def dense_tokens(pools: Sequence[RaggedPool], name: str, columns: int) -> torch.Tensor:
    """Copy a field to `[B, H_kv, columns, D]`, every token to its column; zeros elsewhere."""
    field, (batch, heads) = pools[0].fields[name], pools[0].length.shape
    out = field.new_zeros(batch, heads, columns, *field.shape[1:])
    for pool in pools:
        slots, offset = pool.slots(torch.arange(batch, device="cpu"))
        row, head, index = (offset >= 0).nonzero(as_tuple=True)
        held = slots[row, head, index]
        out[row, head, pool.fields["positions"][held].long()] = pool.fields[name][held]
    return out


def add_shared(out: torch.Tensor, tree: PrefixTree, name: str) -> torch.Tensor:
    """Copy what rows share into `out`, `[B, H_kv, columns, D]`."""
    for row, paths in enumerate(zip(tree.paths, tree.aside, strict=True)):
        for part in (*paths[0], *paths[1]):
            out[row, :, part.columns.long()] = getattr(part, name)
    return out
