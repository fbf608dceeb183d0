"""What R-KV adds to `window_scores` and `redundancy`: its formula, and what it keeps per token."""

from __future__ import annotations

import torch

from ..backend import chosen, uses_triton
from .reference import find_repeats_reference, rkv_scores_reference

__all__ = ["find_repeats", "rkv_scores"]


def find_repeats(state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Turn what was kept about tokens into places among the present ones.

    Parameters
    ----------
    state : IntTensor[R, H, N]
        Second result of an earlier `rkv_scores` for these tokens; 0 for one that was not there.
    positions : LongTensor[R, H, N]
        Ascending; filler, which comes last, is -1 and has state 0.

    Returns
    -------
    LongTensor[R, H, N]
        What `redundancy` takes as `known`. `GONE` may stand for a repeat that is there: its search
        is repeated then.
    """
    if chosen(positions.device) == "triton":
        from .kernel import find_repeats_triton as run
    else:
        run = find_repeats_reference
    return run(state, positions)


def rkv_scores(
    importance: torch.Tensor,
    repeated: torch.Tensor,
    repeat: torch.Tensor,
    positions: torch.Tensor,
    *,
    lam: float,
    kernel: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix importance and redundancy, `lam I - (1 - lam) softmax(R)`, arXiv 2505.24133.

    Parameters
    ----------
    importance : Tensor[R, H, N]
        `I` is its maximum over `kernel` neighbours.
    repeated, repeat : Tensor[R, H, N], LongTensor[R, H, N]
        Results of `redundancy`.
    positions : LongTensor[R, H, N]
        Filler is -1.
    lam : float
    kernel : int
        Odd.

    Returns
    -------
    scores : Tensor[R, H, N]
        float32; 0 for filler.
    state : IntTensor[R, H, N]
        The position of each token's most recent repeat, plus 2; 1 if it has none; 0 for filler.
    """
    if uses_triton(importance):
        from .kernel import rkv_scores_triton as run
    else:
        run = rkv_scores_reference
    return run(importance, repeated, repeat, positions, lam=lam, kernel=kernel)
