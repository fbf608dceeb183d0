"""Definition of `redundancy` in plain PyTorch: O(n d) sums and a search."""

from __future__ import annotations

import torch

# Columns per step of the search. Below 256, so that a column's place in its block fits a byte: the
# byte-wise "last hit" is 3 to 4 times cheaper than the same search over int64 or float32.
BLOCK = 128
# Cosines held at once (16 MB in float32), so that a large batch stays in the last-level cache.
TILE = 1 << 22


def redundancy(keys: torch.Tensor, valid: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """See `triton_ops.redundancy.redundancy`; arguments are taken as valid."""
    rows, heads, count, size = keys.shape
    dtype = torch.promote_types(keys.dtype, torch.float32)
    flat = keys.reshape(rows * heads, count, size).to(dtype)
    flat = flat.where(valid.reshape(rows * heads, count, 1), 0.0)
    unit = flat / flat.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    # sum_i c[i, j] = u_j . (sum_i u_i), less the diagonal, which is |u_j|^2 (0 for a zero key).
    total = (unit @ unit.sum(1).unsqueeze(-1)).squeeze(-1) - unit.square().sum(-1)
    group = max(1, TILE // max(1, count * BLOCK))
    exempted = [_exempted(part, threshold) for part in unit.split(group)]
    mean = (total - torch.cat(exempted)).view(rows, heads, count)
    return (mean / valid.sum(-1, keepdim=True).clamp(min=1)).where(valid, 0.0)


def _exempted(unit: torch.Tensor, threshold: float) -> torch.Tensor:
    """Sum the cosines each column is spared because it is some row's most recent neighbour.

    Columns are scanned in blocks from the most recent backwards. A row leaves the search with its
    first match, and the scan ends when none is left; real keys, which share a large common
    component, mostly match within the first block.

    Parameters
    ----------
    unit : Tensor[S, N, D]
        Keys of unit norm, or zero.

    Returns
    -------
    Tensor[S, N]
    """
    spared = unit.new_zeros(unit.shape[:2])
    places = torch.arange(1, BLOCK + 1, dtype=torch.uint8, device=unit.device)
    row = torch.arange(unit.shape[1], device=unit.device).expand(unit.shape[:2])
    open_ = torch.ones_like(row, dtype=torch.bool)
    searching = unit
    for end in range(unit.shape[1], 0, -BLOCK):
        start = max(0, end - BLOCK)
        cosine = searching @ unit[:, start:end].mT
        head, own = ((row >= start) & (row < end)).nonzero(as_tuple=True)
        cosine[head, own, row[head, own] - start] = 0.0
        # A maximum is 4 to 8 times cheaper than a comparison that writes a mask, so the exact place
        # is sought only for the rows that match here; each row does that once.
        hit = ((cosine.amax(-1) > threshold) & open_).nonzero(as_tuple=True)
        near = cosine[hit]
        place = ((near > threshold).view(torch.uint8) * places[: end - start]).amax(-1).long() - 1
        spared.index_put_(
            (hit[0], start + place), near.gather(1, place[:, None]).squeeze(1), accumulate=True
        )
        open_[hit] = False
        left = int(open_.sum(-1).amax())
        if left == 0:
            break
        if 2 * left <= row.shape[1]:
            # Few rows keep searching (an attention sink resembles nothing): carry only those. Heads
            # with fewer of them carry some closed rows along.
            kept = open_.to(torch.uint8).topk(left, dim=-1).indices
            row, open_ = row.gather(1, kept), open_.gather(1, kept)
            searching = unit.gather(1, row.unsqueeze(-1).expand(-1, -1, unit.shape[2]))
    return spared
