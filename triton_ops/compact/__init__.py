"""In-place compaction of a ragged pool from a keep mask, by filling holes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..backend import chosen
from .reference import compact_reference

__all__ = ["compact"]


def compact(
    fields: Iterable[torch.Tensor], slots: torch.Tensor, offset: torch.Tensor, keep: torch.Tensor
) -> None:
    """Move the kept tokens of every head into its first slots, in place.

    A head that keeps `b` tokens moves those that lie at offset `b` or later into evicted slots
    before `b`. Sources and targets are disjoint, so the moves need no order and no buffer of the
    pool's size, and a head moves at most as many tokens as it evicts. Slot order says nothing about
    age afterwards.

    Parameters
    ----------
    fields : iterable of Tensor[slots, ...]
        Everything stored per slot: keys, values, positions, statistics. Contiguous.
    slots : LongTensor[R, H_kv, N]
        Slot of every token under consideration; filler anywhere, marked by `offset == -1`.
    offset : LongTensor[R, H_kv, N]
        `slots` counted from the head's first slot, -1 for filler. A head's offsets are `0 .. length
        - 1` in any order.
    keep : BoolTensor[R, H_kv, N]
        Tokens to keep; False for filler.

    Raises
    ------
    ValueError
        If a field is not contiguous.
    """
    fields = tuple(fields)
    for field in fields:
        if not field.is_contiguous():
            raise ValueError(
                f"compact: expected contiguous fields [slots, ...], got {list(field.shape)} with "
                f"strides {field.stride()}; pass the storage itself, not a view of it."
            )
    if chosen(slots.device) == "triton":
        from .kernel import compact_triton as run
    else:
        run = compact_reference
    run(fields, slots, offset, keep)
