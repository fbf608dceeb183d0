"""`redundancy` in plain PyTorch without a matrix of all cosines: O(n d) sums and a search."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .neighbours import Neighbours, whole_rows
from .places import NONE
from .search import most_recent_repeats, search

# All cosines of the heads that are searched at once, of which a step of the scan holds a few
# columns. A long prompt, whose heads are searched one after another, borrows little memory.
TILE = 1 << 25
# Heads are searched together if none holds so many times as many tokens as another.
ALIKE = 4
# Two keys alone are as redundant as each other. In float64 the rounding errors by which such a tie
# would be decided, one way in a batch and another without it, vanish in a scorer's softmax.
FEW = 32


def redundancy_cpu(
    keys: torch.Tensor, valid: torch.Tensor, *, threshold: float, known: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `triton_ops.redundancy.redundancy`; arguments are taken as valid."""
    rows, heads, count = valid.shape
    flat, held, known = (x.flatten(0, 1) for x in (keys, valid, known))
    mean = flat.new_zeros(held.shape, dtype=torch.promote_types(keys.dtype, torch.float32))
    repeat = torch.full_like(known, NONE)
    if count and bool(held.all()):
        # No copy of the keys.
        group = _group(count)
        for first in range(0, rows * heads, group):
            part = slice(first, first + group)
            mean[part], repeat[part] = _of_heads(flat[part], held[part], known[part], threshold)
    else:
        for some, extent in _alike(held):
            mean[some], repeat[some] = _of_unequal_heads(flat, held, known, threshold, some, extent)
    return mean.view(rows, heads, count), repeat.view(rows, heads, count)


def _alike(held: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield which heads `[S, N]` are worked on at once, and how many places of each are in use."""
    extent = (torch.arange(1, held.shape[1] + 1, device=held.device) * held).amax(-1)
    left = extent > 0
    while bool(left.any()):
        most = int(extent[left].max())
        # What is computed in float64 for a head alone is so beside others too.
        alike = left & (ALIKE * extent > most) & ((extent > FEW) | (most <= FEW))
        left &= ~alike
        for some in alike.nonzero()[:, 0].split(_group(most)):
            yield some, extent[some]


def _group(used: int) -> int:
    """Heads of `used` tokens that are worked on at once."""
    return max(1, TILE // used**2)


def _of_unequal_heads(
    keys: torch.Tensor,
    held: torch.Tensor,
    known: torch.Tensor,
    threshold: float,
    some: torch.Tensor,
    extent: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`redundancy` of `some` heads, the newest tokens of all of them in the last places.

    There a search finds them in the same block, whatever else the heads hold.
    """
    count, used = held.shape[1], int(extent.max())
    ahead = (used - extent)[:, None]
    place = torch.arange(used, device=keys.device) - ahead
    source = place.clamp(min=0)
    held, known = held[some], known[some]
    inside, there = held.gather(1, source) & (place >= 0), known.gather(1, source)
    aligned = whole_rows(keys, source, some)
    aligned.flatten(0, 1).index_fill_(0, (~inside).flatten().nonzero()[:, 0], 0)
    there = there + ahead.where(there >= 0, 0)
    mean, repeat = _of_heads(aligned, inside, there, threshold)
    repeat -= ahead.where(repeat >= 0, 0)
    back = (torch.arange(count, device=keys.device) + ahead).clamp(max=used - 1)
    return mean.gather(1, back).where(held, 0.0), repeat.gather(1, back).where(held, NONE)


def _of_heads(
    keys: torch.Tensor, held: torch.Tensor, known: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`redundancy` of a few heads `[S, N, D]`, whose scratch is all that lives at once.

    Keys of filler are zero.
    """
    few = keys.shape[1] <= FEW
    dtype = torch.promote_types(keys.dtype, torch.float64 if few else torch.float32)
    norm = keys.to(dtype).norm(dim=-1, keepdim=True)
    inverse = norm.clamp(min=torch.finfo(dtype).tiny).reciprocal()
    neighbours = Neighbours.of(keys, norm, inverse, threshold)
    repeat = most_recent_repeats(neighbours, held, known)
    sure = neighbours.sure
    # Never two copies of the keys at a time: fresh memory costs more than to convert them again.
    del neighbours
    full = keys.to(dtype)
    cosine = _cosines(full, inverse, repeat)
    if not sure:
        doubtful = (repeat != NONE) & (repeat != known) & (cosine <= threshold)
        if bool(doubtful.any()):
            # The newest key that may be near is not; another one may be.
            repeat.masked_fill_(doubtful, NONE)
            search(Neighbours.by_size(full, inverse, threshold), held.shape[1], doubtful, repeat)
            some = doubtful.flatten().nonzero()[:, 0]
            cosine.view(-1)[some] = _cosines(full, inverse, repeat, some)
    # sum_i c[i, j] = u_j . (sum_i u_i), less the diagonal, which is 1, or 0 for a zero key.
    total = (full @ (inverse.mT @ full).mT * inverse - (norm > 0).to(dtype)).squeeze(-1)
    total.scatter_add_(1, repeat.clamp(min=0), -cosine)
    mean = total / held.sum(-1, keepdim=True).clamp(min=1)
    return mean.where(held, 0.0).to(torch.promote_types(keys.dtype, torch.float32)), repeat


def _cosines(
    full: torch.Tensor,
    inverse: torch.Tensor,
    repeat: torch.Tensor,
    some: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cosines of keys with their repeats, 0 where there is none.

    Of all keys `[S, N]`, or of those in places `some` of all heads' keys in a row.
    """
    start = torch.arange(len(repeat), device=repeat.device)[:, None] * repeat.shape[1]
    other, keys, scale = repeat + start, full.flatten(0, 1), inverse.flatten(1)
    own, own_scale = full, scale
    if some is not None:
        repeat, other, own_scale = (x.flatten()[some] for x in (repeat, other, scale))
        own = keys[some]
    # Anything will do where there is none; -1 is out of range for the first key alone.
    other = other.clamp(min=0).flatten()
    # Products of keys first, norms afterwards: dividing all keys would be one more pass over them.
    product = keys.index_select(0, other).view_as(own).mul_(own).sum(-1).mul_(own_scale)
    product *= scale.flatten().index_select(0, other).view_as(product)
    return product.masked_fill_(repeat == NONE, 0.0)
