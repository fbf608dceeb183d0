"""Tokens that an attention mask hides: out of the pool, where nothing sees them, but not lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from hf_reasoncache.storage.pool import RaggedPool

Choice = Callable[[torch.Tensor], torch.Tensor]
"""From the columns of tokens, LongTensor[B, H_kv, N], to those that are meant, BoolTensor."""


def exchange(pool: RaggedPool, aside: RaggedPool | None, hidden: torch.Tensor) -> RaggedPool | None:
    """Take what a mask hides out of a pool, and put back what it shows again.

    Parameters
    ----------
    pool : RaggedPool
        Changed in place; it grows if tokens come back for which it has no room.
    aside : RaggedPool or None
        What an earlier mask has hidden; not changed.
    hidden : BoolTensor[B, T]
        Columns of each row that the mask hides.

    Returns
    -------
    RaggedPool or None
        What is hidden now; None if nothing is.
    """

    def is_hidden(columns: torch.Tensor) -> torch.Tensor:
        rows = hidden.to(columns.device)[:, None].expand(-1, columns.shape[1], -1)
        return rows.gather(-1, columns.clamp(0, hidden.shape[1] - 1))

    def is_shown(columns: torch.Tensor) -> torch.Tensor:
        return ~is_hidden(columns)

    found = gathered([pool] if aside is None else [pool, aside], is_hidden)
    slots, offset, leaving = _find(pool, is_hidden)
    if bool(leaving.any()):
        pool.compact(_rows(pool), slots, offset, (offset >= 0) & ~leaving)
    if aside is not None:
        slots, _, returning = _find(aside, is_shown)
        added = returning.sum(-1).cpu()
        if bool(added.any()):
            if bool((pool.length + added > pool.capacity).any()):
                pool.relayout(torch.maximum(pool.capacity, pool.length + added))
            _copy(aside, slots, returning, pool)
    return found


def gathered(sources: Iterable[RaggedPool], choice: Choice) -> RaggedPool | None:
    """Copy some tokens of pools with the same heads into a new pool; None if there are none."""
    found = [(source, *_find(source, choice)) for source in sources]
    counts = torch.stack([chosen.sum(-1) for *_, chosen in found]).sum(0).cpu()
    if not bool(counts.any()):
        return None
    like = found[0][0]
    statistics = {name: like.fields[name].dtype for name in like.statistics}
    made = RaggedPool(counts, like.held_fields, statistics)
    for source, slots, _, chosen in found:
        _copy(source, slots, chosen, made)
    return made


def _find(pool: RaggedPool, choice: Choice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots and offsets of all tokens, as `RaggedPool.slots` has them, and which are chosen."""
    slots, offset = pool.slots(_rows(pool))
    chosen = choice(pool.take("positions", slots).long()) & (offset >= 0)
    return slots, offset, chosen


def _copy(
    source: RaggedPool, slots: torch.Tensor, chosen: torch.Tensor, target: RaggedPool
) -> None:
    """Append the chosen tokens of one pool to the heads of another, which has room for them."""
    tokens = {name: source.take(name, slots) for name in source.held_fields}
    statistics = {name: source.take(name, slots) for name in source.statistics}
    target.append(tokens, source.take("positions", slots), chosen, **statistics)


def _rows(pool: RaggedPool) -> torch.Tensor:
    return torch.arange(len(pool.length), device="cpu")
