"""The CPU path's search for every key's most recent repeat."""

from __future__ import annotations

import torch

from .neighbours import NORMAL, Neighbours
from .places import NONE, UNSEEN

BLOCK = 128
"""Columns per step of the scan."""


def most_recent_repeats(
    neighbours: Neighbours, held: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """Find every key's most recent repeat.

    Parameters
    ----------
    neighbours : Neighbours
    held : BoolTensor[S, N]
        False for filler.
    known : LongTensor[S, N]
        See `triton_ops.redundancy.redundancy`.

    Returns
    -------
    LongTensor[S, N]
        Its place, `NONE` where there is none.
    """
    repeat, open_, end = _scan(neighbours, held, known)
    if bool(open_.any()):
        search(neighbours, end, open_, repeat)
    return repeat


def _scan(
    neighbours: Neighbours, held: torch.Tensor, known: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Answer for most rows, comparing every row with every column.

    Columns are scanned in blocks from the most recent backwards, by the rows of the block and older
    ones. Cosines are symmetric, so the same block answers its own rows for all older columns, after
    which they are done: half of the matrix is all that is ever computed. A row leaves with its
    first match, or once only columns are left for which its answer is known. Real keys, which share
    a large common component, mostly match within the first block.

    Returns
    -------
    repeat : LongTensor[S, N]
    open_ : BoolTensor[S, N]
        The few rows that are left (an attention sink resembles nothing).
    end : int
        Those have seen all columns from here on.
    """
    open_, answered = held.clone(), known >= NONE
    repeat = known.where(answered, NONE)
    # Keys before this place have been compared with each other.
    place = torch.arange(1, known.shape[1] + 1, device=known.device)
    compared = (place * (known != UNSEEN)).amax(-1, keepdim=True).where(answered, 0)
    for end in range(known.shape[1], 0, -BLOCK):
        open_ &= compared < end
        if 2 * int(open_[:, :end].sum(-1).amax()) <= end:
            return repeat, open_, end
        start = max(0, end - BLOCK)
        near = neighbours.near(neighbours.block(start, end))
        _answer(near, -1, start, open_[:, :end], repeat[:, :end])
        if start and bool(open_[:, start:end].any()):
            older = near[:, :start]
            _answer(older, -2, 0, open_[:, start:end], repeat[:, start:end], fresh=False)
        # Its own rows have now seen all columns.
        open_[:, start:end] = False
    return repeat, open_, 0


def search(neighbours: Neighbours, end: int, asking: torch.Tensor, repeat: torch.Tensor) -> None:
    """Scan all columns before `end` for a few rows.

    Parameters
    ----------
    neighbours : Neighbours
    end : int
    asking : BoolTensor[S, N]
        Rows that want an answer.
    repeat : LongTensor[S, N]
        What stands if they match nothing; written in place.
    """
    most = int(asking.sum(-1).amax())
    most = min(asking.shape[1], -(-most // neighbours.multiple) * neighbours.multiple)
    # Heads with fewer of them carry some other rows along.
    row = asking.to(torch.uint8).topk(most, dim=-1).indices
    open_, found = asking.gather(1, row), repeat.gather(1, row)
    # As columns: the matrix is symmetric, and a product with few columns is faster.
    searching = neighbours.columns(row)
    # The bytes of a scan.
    block = max(1, BLOCK * repeat.shape[1] // most)
    for last in range(end, 0, -block):
        first = max(0, last - block)
        product = neighbours.rows[:, first:last] @ searching.mT
        head, own = ((row >= first) & (row < last)).nonzero(as_tuple=True)
        product[head, row[head, own] - first, own] = 0.0
        _answer(neighbours.near(product), -2, first, open_, found)
        if not bool(open_.any()):
            break
    repeat.scatter_(1, row, found)


def _answer(
    near: torch.Tensor,
    dim: int,
    first: int,
    open_: torch.Tensor,
    repeat: torch.Tensor,
    *,
    fresh: bool = True,
) -> None:
    """Close the rows that match; the last match is their answer.

    Parameters
    ----------
    near : Tensor[S, R, C] or, for `dim` -2, Tensor[S, C, R]
        What `Neighbours.near` returns, for the rows and some columns; written to, but what was
        positive stays positive.
    dim : int
        Along which the columns lie.
    first : int
        Place of the first of the columns.
    open_, repeat : BoolTensor[S, R], LongTensor[S, R]
        Written in place.
    fresh : bool
        False if another answer has been read off `near` already.
    """
    columns = near.shape[dim]
    signed = near.dtype == torch.int16
    wide = signed and columns > torch.iinfo(torch.int16).max
    dtype = torch.int32 if wide else near.dtype
    places = torch.arange(1, columns + 1, dtype=dtype, device=near.device)
    places = places if dim == -1 else places[:, None]
    if signed and fresh and columns <= NORMAL:
        near = torch.minimum(near, places, out=near)
    else:
        near = near.clamp_(0, 1) if signed or not fresh else near
        near = near * places if wide else near.mul_(places)
    last = near.amax(dim)
    hit = open_ & (last > 0)
    repeat.copy_((last.long() + (first - 1)).where(hit, repeat))
    open_ &= ~hit
