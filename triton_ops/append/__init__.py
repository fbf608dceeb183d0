"""Append one token to every head of a ragged pool whose lengths are on its device."""

from __future__ import annotations

import torch

from ..backend import chosen
from .reference import append_reference

__all__ = ["append"]


def append(
    pool: tuple[torch.Tensor, ...],
    start: torch.Tensor,
    length: torch.Tensor,
    new: tuple[torch.Tensor, ...],
    column: torch.Tensor | int,
    asked: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Write a token behind the last one of every head, and count it; there must be room.

    Nothing is read on the host, so that a captured step can be repeated.

    Parameters
    ----------
    pool : tuple of Tensor
        One to three fields `[slots, D]`, then positions, IntTensor[slots]; contiguous.
    start : LongTensor[B, H_kv]
        First slot of each head.
    length : LongTensor[B, H_kv]
        Slots in use of each head, on the pool's device; increased by one.
    new : tuple of Tensor[B, H_kv, 1, D]
        What each field gets, of its type.
    column : LongTensor[1] or int
        Position of the token.
    asked : two of Tensor, optional
        A ring of queries, `[B, H_q, places, D_q]` and contiguous, and the token's queries
        `[B, H_q, 1, D_q]`, which are written to place `column % places` of it.

    Raises
    ------
    ValueError
        If the shapes or types do not fit together.
    """
    shape = (*length.shape, 1)
    for field, each in zip(pool[:-1], new, strict=True):
        if each.shape != (*shape, field.shape[1]) or each.dtype != field.dtype:
            raise ValueError(
                f"append: expected one token for each of {list(length.shape)} heads, "
                f"{[*shape, field.shape[1]]} in {field.dtype}, got {list(each.shape)} in "
                f"{each.dtype}."
            )
    if asked is not None:
        ring, query = asked
        fits = query.shape == (*ring.shape[:2], 1, ring.shape[3]) and query.dtype == ring.dtype
        if not fits or len(ring) != len(length):
            raise ValueError(
                f"append: expected queries of one token for a ring {list(ring.shape)} of "
                f"{len(length)} rows in {ring.dtype}, got {list(query.shape)} in {query.dtype}."
            )
    if chosen(pool[0].device) == "triton":
        from .kernel import append_triton as run
    else:
        run = append_reference
    run(pool, start, length, new, column, asked)
