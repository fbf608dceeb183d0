"""Definition of `redundancy` in plain PyTorch: O(n d) sums and a search."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from triton_ops.redundancy.neighbours import Neighbours, whole_rows
from triton_ops.redundancy.places import NONE
from triton_ops.redundancy.search import most_recent_repeats

# Bytes of all cosines of the heads that are searched at once, of which a step of the scan holds a
# few columns. A long prompt, whose heads are searched one after another, borrows little memory.
TILE = 1 << 24
# Two keys alone are as redundant as each other. In float64 the rounding errors by which such a tie
# would be decided, one way in a batch and another without it, vanish in a scorer's softmax.
FEW = 32


def redundancy(
    keys: torch.Tensor, valid: torch.Tensor, *, threshold: float, known: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `triton_ops.redundancy.redundancy`; arguments are taken as valid."""
    rows, heads, count = valid.shape
    flat, held, known = (x.flatten(0, 1) for x in (keys, valid, known))
    mean = flat.new_zeros(held.shape, dtype=torch.promote_types(keys.dtype, torch.float32))
    repeat = torch.full_like(known, NONE)
    for some, used in _together(held, keys.itemsize):
        mean[some, :used], repeat[some, :used] = _of_heads(
            flat[some, :used], held[some, :used], known[some, :used], threshold
        )
    return mean.view(rows, heads, count), repeat.view(rows, heads, count)


def _together(held: torch.Tensor, size: int) -> Iterator[tuple[slice | torch.Tensor, int]]:
    """Yield which heads `[S, N]` are worked on at once, and how many tokens those hold.

    Heads that hold as many tokens go together: their new tokens lie in the same block. `size` is
    that of a number in bytes.
    """
    heads, count = held.shape
    if count and bool(held.all()):
        # No copy of the keys.
        group = _group(count, size)
        yield from ((slice(first, first + group), count) for first in range(0, heads, group))
        return
    extent = (torch.arange(1, count + 1, device=held.device) * held).amax(-1)
    for used in extent[extent > 0].unique().tolist():
        for some in (extent == used).nonzero()[:, 0].split(_group(used, size)):
            yield some, used


def _group(used: int, size: int) -> int:
    """Heads of `used` tokens, with cosines of `size` bytes, that are worked on at once."""
    return max(1, TILE // (used**2 * size))


def _of_heads(
    keys: torch.Tensor, held: torch.Tensor, known: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`redundancy` of a few heads `[S, N, D]`, whose scratch is all that lives at once."""
    few = keys.shape[1] <= FEW
    dtype = torch.promote_types(keys.dtype, torch.float64 if few else torch.float32)
    if not bool(held.all()):
        keys = keys.where(held[..., None], 0.0)
    full = keys.to(dtype)
    norm = full.norm(dim=-1, keepdim=True)
    inverse = norm.clamp(min=torch.finfo(dtype).tiny).reciprocal()
    neighbours = Neighbours.of(keys, full, norm, inverse, threshold)
    repeat = most_recent_repeats(neighbours, held, known)
    exempt = repeat.clamp(min=0)
    # Products of keys first, norms afterwards: dividing all keys would be one more pass over them.
    cosine = whole_rows(full, exempt).mul_(full).sum(-1) * inverse[..., 0]
    cosine = (cosine * inverse[..., 0].gather(1, exempt)).where(repeat != NONE, 0.0)
    # sum_i c[i, j] = u_j . (sum_i u_i), less the diagonal, which is 1, or 0 for a zero key.
    total = (full @ (inverse.mT @ full).mT * inverse - (norm > 0).to(dtype)).squeeze(-1)
    total.scatter_add_(1, exempt, -cosine)
    mean = total / held.sum(-1, keepdim=True).clamp(min=1)
    return mean.where(held, 0.0).to(torch.promote_types(keys.dtype, torch.float32)), repeat
