"""The search for every key's most recent repeat, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from triton_ops.redundancy.places import NONE, UNSEEN

BLOCK = 128
"""Columns per step of the scan."""

# A cosine of two unit vectors near 1/2 is off by less than 0.01 in bfloat16: both factors of a
# product by at most 2^-8 of themselves, the result by 2^-8 of 1/2.
_SLACK = 0.01


def most_recent_repeats(
    unit: torch.Tensor, held: torch.Tensor, known: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find every key's most recent repeat.

    Parameters
    ----------
    unit : Tensor[S, N, D]
        Keys of unit norm, or zero.
    held : BoolTensor[S, N]
        False for filler.
    known : LongTensor[S, N]
        See `triton_ops.redundancy.redundancy`.
    threshold : float

    Returns
    -------
    repeat : LongTensor[S, N]
        Its place, `NONE` where there is none.
    cosine : Tensor[S, N]
        Of the key and its repeat, 0 where there is none.
    """
    screened = _screens(unit, threshold)
    screen = unit.to(torch.bfloat16) if screened else unit
    repeat, open_, end = _scan(screen, held, known, threshold)
    if screened:
        # What looked like a repeat in bfloat16 and is none; the next candidate is an older one.
        wrong = (repeat != NONE) & (_cosine(unit, repeat) <= threshold)
        end = max(end, int(repeat.where(wrong, 0).max()))
        repeat.masked_fill_(wrong, NONE)
        open_ |= wrong
    if bool(open_.any()):
        _search(unit, end, open_, repeat, threshold)
    return repeat, _cosine(unit, repeat)


def _scan(
    unit: torch.Tensor, held: torch.Tensor, known: torch.Tensor, threshold: float
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
    repeat, open_, seen = torch.full_like(known, NONE), held.clone(), known != UNSEEN
    # Keys before this place have been compared with each other.
    place = torch.arange(1, seen.shape[1] + 1, device=unit.device)
    compared = (place * seen).amax(-1, keepdim=True) if bool(seen.any()) else None
    for end in range(unit.shape[1], 0, -BLOCK):
        if compared is not None:
            done = open_ & seen & (compared >= end)
            repeat = known.where(done, repeat)
            open_ &= ~done
        if 2 * int(open_[:, :end].sum(-1).amax()) <= end:
            return repeat, open_, end
        start = max(0, end - BLOCK)
        cosine = unit[:, :end] @ unit[:, start:end].mT
        cosine[:, start:].diagonal(dim1=-2, dim2=-1).zero_()
        near = _near(cosine, threshold)
        _answer(near, -1, start, open_[:, :end], repeat[:, :end])
        if start and bool(open_[:, start:end].any()):
            _answer(near[:, :start], -2, 0, open_[:, start:end], repeat[:, start:end])
        # Its own rows have now seen all columns.
        open_[:, start:end] = False
    return repeat, open_, 0


def _search(
    unit: torch.Tensor, end: int, asking: torch.Tensor, repeat: torch.Tensor, threshold: float
) -> None:
    """Scan the columns before `end` for a few rows.

    Parameters
    ----------
    unit : Tensor[S, N, D]
    end : int
    asking : BoolTensor[S, N]
        Rows that want an answer.
    repeat : LongTensor[S, N]
        `NONE` for those; written in place.
    threshold : float
    """
    most = int(asking.sum(-1).amax())
    # Heads with fewer of them carry some other rows along.
    row = asking.to(torch.uint8).topk(most, dim=-1).indices
    open_, found = asking.gather(1, row), repeat.gather(1, row)
    searching = unit.gather(1, row.unsqueeze(-1).expand(-1, -1, unit.shape[2]))
    # Few rows by many columns: in float32, the bytes of a scan in bfloat16.
    block = max(1, BLOCK * unit.shape[1] // (2 * most))
    for last in range(end, 0, -block):
        first = max(0, last - block)
        seen = searching @ unit[:, first:last].mT
        head, own = ((row >= first) & (row < last)).nonzero(as_tuple=True)
        seen[head, own, row[head, own] - first] = 0.0
        _answer(_near(seen, threshold), -1, first, open_, found)
        if not bool(open_.any()):
            break
    repeat.scatter_(1, row, found)


def _near(cosine: torch.Tensor, threshold: float) -> torch.Tensor:
    """Turn cosines into 1 where they are over the threshold, 0 elsewhere, in place.

    In bfloat16, 1 also where they may be. Numbers instead of booleans, which take 7 times as long
    on a CPU.
    """
    if cosine.dtype != torch.bfloat16:
        return cosine.gt_(threshold)
    # Positive numbers are in order as their bits are, and negative ones have negative bits.
    least = torch.tensor(threshold - _SLACK, dtype=cosine.dtype, device="cpu")
    bound = int(least.view(torch.int16)) - 1
    return cosine.view(torch.int16).clamp_(bound, bound + 1).sub_(bound)


def _answer(
    near: torch.Tensor, dim: int, first: int, open_: torch.Tensor, repeat: torch.Tensor
) -> None:
    """Close the rows that match; the last match is their answer.

    Parameters
    ----------
    near : Tensor[S, R, C] or, for `dim` -2, Tensor[S, C, R]
        What `_near` returns, for the rows and some columns.
    dim : int
        Along which the columns lie.
    first : int
        Place of the first of the columns.
    open_, repeat : BoolTensor[S, R], LongTensor[S, R]
        Written in place.
    """
    columns = near.shape[dim]
    wide = near.dtype == torch.int16 and columns > torch.iinfo(torch.int16).max
    dtype = torch.int32 if wide else near.dtype
    places = torch.arange(1, columns + 1, dtype=dtype, device=near.device)
    last = (near * (places if dim == -1 else places[:, None])).amax(dim)
    hit = open_ & (last > 0)
    repeat.copy_((last.long() + (first - 1)).where(hit, repeat))
    open_ &= ~hit


def _cosine(unit: torch.Tensor, repeat: torch.Tensor) -> torch.Tensor:
    """Cosine of every key and its repeat, 0 where there is none."""
    flat, heads = unit.flatten(0, 1), torch.arange(len(unit), device=unit.device)
    place = repeat.clamp(min=0) + (heads * unit.shape[1])[:, None]
    # Whole rows, 6 times faster on a CPU than indexing by head and place.
    repeated = flat.index_select(0, place.flatten())
    return torch.linalg.vecdot(repeated, flat).view_as(repeat).where(repeat != NONE, 0.0)


def _screens(unit: torch.Tensor, threshold: float) -> bool:
    """Whether cosines in bfloat16 say where to look: 4 times faster where the CPU has it."""
    if unit.device.type != "cpu" or unit.dtype != torch.float32 or threshold <= 2 * _SLACK:
        return False
    return bool(_capabilities().get("avx512_bf16") or _capabilities().get("amx_bf16"))


def _capabilities() -> Mapping[str, Any]:
    """What the CPU can do; older releases of torch do not say."""
    return getattr(torch.cpu, "get_capabilities", dict)()
