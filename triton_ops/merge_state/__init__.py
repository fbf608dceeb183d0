"""Join attention to two sets of tokens into attention to both."""

from __future__ import annotations

import torch

from ..backend import uses_triton
from .reference import merge_state_reference

__all__ = ["merge_state"]


def merge_state(
    out: torch.Tensor, logsumexp: torch.Tensor, other: torch.Tensor, other_logsumexp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join two attention results of the same queries over disjoint tokens.

    `(e^a out + e^b other) / (e^a + e^b)` with the logsumexps `a` and `b`: the identity behind
    split and cascaded attention (FlashAttention, arXiv 2205.14135; Hydragen, arXiv 2402.05099).

    Parameters
    ----------
    out, other : Tensor[..., D_v]
    logsumexp, other_logsumexp : Tensor[...]
        Natural logarithms of the sums of weights; -inf for a query that saw nothing.

    Returns
    -------
    out : Tensor[..., D_v]
        In the type of `out`; computed in float32 (float64 for float64). A query that saw nothing
        on both sides gets 0.
    logsumexp : Tensor[...]
        float32 (float64 for float64).

    Raises
    ------
    ValueError
        If the shapes do not fit together.
    """
    if out.shape != other.shape or not (logsumexp.shape == other_logsumexp.shape == out.shape[:-1]):
        raise ValueError(
            "merge_state expects two results [..., D_v] and their logsumexps [...], got "
            f"{list(out.shape)}, {list(logsumexp.shape)}, {list(other.shape)} and "
            f"{list(other_logsumexp.shape)}."
        )
    if uses_triton(out):
        from .kernel import merge_state_triton as run
    else:
        run = merge_state_reference
    return run(out, logsumexp, other, other_logsumexp)
