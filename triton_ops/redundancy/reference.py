"""Definition of `redundancy` in plain PyTorch: O(n d) sums and a search."""

from __future__ import annotations

import torch

# Columns per step of the search. Below 256, so that a column's place in its block fits a byte: the
# byte-wise "last hit" is 3 to 4 times cheaper than the same search over int64 or float32.
BLOCK = 128
# Cosines held at once (4 MB in float32), so that they stay in a cache and a long prompt, whose
# heads are searched one after another, borrows little memory.
TILE = 1 << 20


def redundancy(keys: torch.Tensor, valid: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """See `triton_ops.redundancy.redundancy`; arguments are taken as valid."""
    rows, heads, count, size = keys.shape
    dtype = torch.promote_types(keys.dtype, torch.float32)
    held = valid.reshape(rows * heads, count)
    unit = keys.reshape(rows * heads, count, size).to(dtype)
    if not bool(held.all()):
        unit = unit.where(held[..., None], 0.0)
    norm = unit.norm(dim=-1, keepdim=True)
    unit = unit / norm.clamp(min=torch.finfo(dtype).tiny)
    # sum_i c[i, j] = u_j . (sum_i u_i), less the diagonal, which is 1, or 0 for a zero key.
    total = (unit @ unit.sum(1).unsqueeze(-1) - (norm > 0).to(dtype)).squeeze(-1)
    group = max(1, TILE // max(1, count * BLOCK))
    parts = zip(unit.split(group), held.split(group), strict=True)
    spared = [_spared(*part, threshold) for part in parts]
    mean = (total - torch.cat(spared)).view(rows, heads, count)
    return (mean / valid.sum(-1, keepdim=True).clamp(min=1)).where(valid, 0.0)


def _spared(unit: torch.Tensor, held: torch.Tensor, threshold: float) -> torch.Tensor:
    """Sum the cosines each column is spared because it is some row's most recent neighbour.

    Columns are scanned in blocks from the most recent backwards, by the rows of the block and older
    ones. Cosines are symmetric, so the same block answers its own rows for all older columns, after
    which they are done: half of the matrix is all that is ever computed. A row also leaves with its
    first match, and the scan ends when none is left; real keys, which share a large common
    component, mostly match within the first block.

    Parameters
    ----------
    unit : Tensor[S, N, D]
        Keys of unit norm, or zero.
    held : BoolTensor[S, N]
        Rows to search for.
    threshold : float

    Returns
    -------
    Tensor[S, N]
    """
    spared, open_ = unit.new_zeros(held.shape), held.clone()
    for end in range(unit.shape[1], 0, -BLOCK):
        left = int(open_[:, :end].sum(-1).amax())
        if left == 0:
            break
        if 2 * left <= end:
            # Few rows keep searching (an attention sink resembles nothing): carry only those.
            _search(unit, open_[:, :end], left, threshold, spared)
            break
        start = max(0, end - BLOCK)
        cosine = unit[:, :end] @ unit[:, start:end].mT
        cosine[:, start:].diagonal(dim1=-2, dim2=-1).zero_()
        _settle(cosine, open_[:, :end], threshold, spared[:, start:end])
        if start and bool(open_[:, start:end].any()):
            _settle(cosine[:, :start].mT, open_[:, start:end], threshold, spared[:, :start])
    return spared


def _search(
    unit: torch.Tensor, open_: torch.Tensor, left: int, threshold: float, spared: torch.Tensor
) -> None:
    """Scan the columns before `open_.shape[1]` for at most `left` open rows per head."""
    end = open_.shape[1]
    # Heads with fewer of them carry some closed rows along.
    row = open_.to(torch.uint8).topk(left, dim=-1).indices
    open_ = open_.gather(1, row)
    searching = unit.gather(1, row.unsqueeze(-1).expand(-1, -1, unit.shape[2]))
    for last in range(end, 0, -BLOCK):
        first = max(0, last - BLOCK)
        cosine = searching @ unit[:, first:last].mT
        head, own = ((row >= first) & (row < last)).nonzero(as_tuple=True)
        cosine[head, own, row[head, own] - first] = 0.0
        _settle(cosine, open_, threshold, spared[:, first:last])
        if not bool(open_.any()):
            break


def _settle(
    cosine: torch.Tensor, open_: torch.Tensor, threshold: float, spared: torch.Tensor
) -> None:
    """Close the rows that match among some columns and spare each the last of them, in place.

    Parameters
    ----------
    cosine : Tensor[S, R, C]
    open_ : BoolTensor[S, R]
    threshold : float
    spared : Tensor[S, C]
    """
    # A maximum is 4 to 8 times cheaper than a comparison that writes a mask, so the exact place is
    # sought only for the rows that match here; each row does that once.
    hit = ((cosine.amax(-1) > threshold) & open_).nonzero(as_tuple=True)
    near = cosine[hit]
    columns = near.shape[1]
    places = torch.arange(
        1, columns + 1, dtype=torch.uint8 if columns < 256 else torch.int32, device=near.device
    )
    place = ((near > threshold).view(torch.uint8) * places).amax(-1).long() - 1
    spared.index_put_((hit[0], place), near.gather(1, place[:, None]).squeeze(1), accumulate=True)
    open_[hit] = False
