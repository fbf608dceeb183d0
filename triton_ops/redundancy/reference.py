"""Definition of `redundancy` in plain PyTorch: O(n d) sums and a search."""

from __future__ import annotations

import torch

from triton_ops.redundancy.places import NONE, UNSEEN

# Columns per step of the search. Below 256, so that a column's place in its block fits a byte: the
# byte-wise "last hit" is 3 to 4 times cheaper than the same search over int64 or float32.
BLOCK = 128
# Cosines held at once (4 MB in float32), so that they stay in a cache and a long prompt, whose
# heads are searched one after another, borrows little memory.
TILE = 1 << 20


def redundancy(
    keys: torch.Tensor, valid: torch.Tensor, *, threshold: float, known: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `triton_ops.redundancy.redundancy`; arguments are taken as valid."""
    rows, heads, count = valid.shape
    flat, held, known = (x.flatten(0, 1) for x in (keys, valid, known))
    mean = flat.new_zeros(held.shape, dtype=torch.promote_types(keys.dtype, torch.float32))
    repeat = torch.full_like(known, NONE)
    place = torch.arange(1, count + 1, device=keys.device)
    # A maximum over nothing has no value, a sum has.
    extent = (place * held).amax(-1) if count else held.sum(-1)
    # Heads that hold as many tokens go together: their new tokens lie in the same block.
    for used in extent.unique().tolist():
        group = max(1, TILE // max(1, used * BLOCK))
        for some in (extent == used).nonzero()[:, 0].split(group):
            mean[some, :used], repeat[some, :used] = _of_heads(
                flat[some, :used], held[some, :used], known[some, :used], threshold
            )
    return mean.view(rows, heads, count), repeat.view(rows, heads, count)


def _of_heads(
    keys: torch.Tensor, held: torch.Tensor, known: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`redundancy` of a few heads `[S, N, D]`, whose scratch is all that lives at once."""
    dtype = torch.promote_types(keys.dtype, torch.float32)
    unit = keys.to(dtype)
    if not bool(held.all()):
        unit = unit.where(held[..., None], 0.0)
    norm = unit.norm(dim=-1, keepdim=True)
    unit = unit / norm.clamp(min=torch.finfo(dtype).tiny)
    repeat = torch.full_like(known, NONE)
    _find(unit, held, known, repeat, threshold)

    found, place = repeat != NONE, repeat.clamp(min=0)
    head = torch.arange(len(unit), device=keys.device)[:, None]
    exempted = (unit[head, place] * unit).sum(-1)
    # sum_i c[i, j] = u_j . (sum_i u_i), less the diagonal, which is 1, or 0 for a zero key.
    total = (unit @ unit.sum(1).unsqueeze(-1) - (norm > 0).to(dtype)).squeeze(-1)
    total.scatter_add_(1, place, -exempted.where(found, 0.0))
    mean = total / held.sum(-1, keepdim=True).clamp(min=1)
    return mean.where(held, 0.0), repeat


def _find(
    unit: torch.Tensor,
    held: torch.Tensor,
    known: torch.Tensor,
    repeat: torch.Tensor,
    threshold: float,
) -> None:
    """Write every key's most recent repeat into `repeat`.

    Columns are scanned in blocks from the most recent backwards, by the rows of the block and older
    ones. Cosines are symmetric, so the same block answers its own rows for all older columns, after
    which they are done: half of the matrix is all that is ever computed. A row leaves with its
    first match, or once only columns are left for which its answer is known. The scan ends when no
    row is left; real keys, which share a large common component, mostly match within the first
    block.

    Parameters
    ----------
    unit : Tensor[S, N, D]
        Keys of unit norm, or zero.
    held : BoolTensor[S, N]
        False for filler.
    known : LongTensor[S, N]
        See `triton_ops.redundancy.redundancy`.
    repeat : LongTensor[S, N]
        Filled with `NONE`; written in place.
    threshold : float
    """
    open_, seen = held.clone(), known != UNSEEN
    # Keys before this place have been compared with each other.
    place = torch.arange(1, seen.shape[1] + 1, device=unit.device)
    compared = (place * seen).amax(-1, keepdim=True) if bool(seen.any()) else None
    for end in range(unit.shape[1], 0, -BLOCK):
        if compared is not None:
            done = open_ & seen & (compared >= end)
            repeat.copy_(known.where(done, repeat))
            open_ &= ~done
        left = int(open_[:, :end].sum(-1).amax())
        if left == 0:
            break
        if 2 * left <= end:
            # Few rows keep searching (an attention sink resembles nothing): carry only those.
            _search(unit, open_[:, :end], left, repeat, threshold)
            break
        start = max(0, end - BLOCK)
        cosine = unit[:, :end] @ unit[:, start:end].mT
        cosine[:, start:].diagonal(dim1=-2, dim2=-1).zero_()
        _settle(cosine, start, open_[:, :end], repeat[:, :end], threshold)
        if start and bool(open_[:, start:end].any()):
            older = cosine[:, :start].mT
            _settle(older, 0, open_[:, start:end], repeat[:, start:end], threshold)


def _search(
    unit: torch.Tensor, open_: torch.Tensor, left: int, repeat: torch.Tensor, threshold: float
) -> None:
    """Scan the columns before `open_.shape[1]` for the open rows, at most `left` per head."""
    end = open_.shape[1]
    # Heads with fewer of them carry some closed rows along.
    row = open_.to(torch.uint8).topk(left, dim=-1).indices
    open_, found = open_.gather(1, row), repeat.gather(1, row)
    searching = unit.gather(1, row.unsqueeze(-1).expand(-1, -1, unit.shape[2]))
    for last in range(end, 0, -BLOCK):
        first = max(0, last - BLOCK)
        cosine = searching @ unit[:, first:last].mT
        head, own = ((row >= first) & (row < last)).nonzero(as_tuple=True)
        cosine[head, own, row[head, own] - first] = 0.0
        _settle(cosine, first, open_, found, threshold)
        if not bool(open_.any()):
            break
    repeat.scatter_(1, row, found)


def _settle(
    cosine: torch.Tensor, first: int, open_: torch.Tensor, repeat: torch.Tensor, threshold: float
) -> None:
    """Close the rows that match among some columns; the last match is their answer.

    Parameters
    ----------
    cosine : Tensor[S, R, C]
    first : int
        Place of the first of the columns.
    open_, repeat : BoolTensor[S, R], LongTensor[S, R]
        Written in place.
    threshold : float
    """
    # A maximum is 4 to 8 times cheaper than a comparison that writes a mask, so the exact place is
    # sought only for the rows that match here; each row does that once.
    hit = ((cosine.amax(-1) > threshold) & open_).nonzero(as_tuple=True)
    near = cosine[hit] > threshold
    columns = near.shape[1]
    dtype = torch.uint8 if columns < 256 else torch.int32
    places = torch.arange(1, columns + 1, dtype=dtype, device=near.device)
    repeat[hit] = (near.view(torch.uint8) * places).amax(-1).long() - 1 + first
    open_[hit] = False
