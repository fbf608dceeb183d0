"""How much each held key repeats the others: the redundancy term of R-KV."""

from __future__ import annotations

import torch

from ..backend import uses_triton
from .cpu import redundancy_cpu
from .places import GONE, NONE, UNSEEN

__all__ = ["GONE", "NONE", "UNSEEN", "redundancy"]


def redundancy(
    keys: torch.Tensor,
    valid: torch.Tensor,
    *,
    threshold: float = 0.5,
    known: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the cosine similarity of every key with the other keys of its head.

    With cosines `c[i, j]` between the `n` valid keys of a head and `c[i, i] = 0`, every row `i`
    exempts its most recent repeat `r(i)`, the largest `j != i` with `c[i, j] > threshold` (the
    newest of a group of repeats should survive), and the redundancy of `j` is the column mean
    `sum(c[i, j] for i if r(i) != j) / n`. This is the quantity of R-KV (arXiv 2505.24133) before
    its softmax. Ours: no `n x n` matrix is formed, every batch row is scored by its own keys, a row
    without a repeat exempts none (the public code then exempts token 0), and the search for repeats
    can go on from an earlier one: `w` new keys cost `n w d` operations instead of `n n d`.

    Parameters
    ----------
    keys : Tensor[R, H, N, D]
        Sorted by position, oldest first. A zero key has cosine 0 with every other.
    valid : BoolTensor[R, H, N]
        False marks filler, which may hold anything and takes no part.
    threshold : float
        Cosine in [0, 1] above which a neighbour counts as a repeat.
    known : LongTensor[R, H, N], optional
        What an earlier call answered for these keys, as places among the present ones: `r(i)`, or
        `NONE`; `GONE` for those whose repeat is gone, `UNSEEN` for keys that it did not see. Keys
        after the last one that is not `UNSEEN` must be the only new ones. Saves work, changes
        nothing.

    Returns
    -------
    mean : Tensor[R, H, N]
        float32 (float64 for float64 keys) in [-1, 1], 0 for filler.
    repeat : LongTensor[R, H, N]
        Place of `r(i)`, or `NONE`.

    Raises
    ------
    ValueError
        If the shapes do not fit together, `valid` is not boolean or `threshold` lies outside [0,
        1].
    """
    if keys.dim() != 4 or valid.shape != keys.shape[:3]:
        raise ValueError(
            "redundancy expects keys [R, H, N, D] and valid [R, H, N], got "
            f"{list(keys.shape)} and {list(valid.shape)}."
        )
    if valid.dtype != torch.bool:
        raise ValueError(f"redundancy expects a bool mask, got {valid.dtype}; use positions >= 0.")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(
            f"redundancy expects a threshold in [0, 1], got {threshold}; the paper's is 0.5."
        )
    if known is None:
        known = torch.full_like(valid, UNSEEN, dtype=torch.long)
    elif known.shape != valid.shape:
        raise ValueError(
            f"redundancy expects known {list(valid.shape)} like valid, got {list(known.shape)}."
        )
    if uses_triton(keys):
        from .kernel import redundancy_triton as run
    else:
        run = redundancy_cpu
    return run(keys, valid, threshold=threshold, known=known)
