"""Attention that recent queries pay to the held keys: the signal of window-based scorers."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ..backend import uses_triton
from .cpu import window_scores_cpu

Group = Literal["max", "mean"]
Sees = Literal["past", "causal", "all"]

__all__ = ["Group", "Sees", "window_scores"]


def window_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scaling: float,
    *,
    group: Group,
    sees: Sees,
) -> torch.Tensor:
    """Average the attention probability of every key over the queries of an observation window.

    Parameters
    ----------
    queries : Tensor[R, H, G, A, D]
        The window's queries, grouped by the KV head they read; `A >= 1`.
    keys : Tensor[R, H, N, D]
        Held keys in any order; filler may hold anything, NaN included.
    query_positions : LongTensor[R, A]
        Position of each query; -1 marks a query the row never had, which takes no part.
    key_positions : LongTensor[R, H, N]
        Position of each key; -1 marks filler.
    scaling : float
        Factor on the logits.
    group : {"max", "mean"}
        "max" pools the *logits* of the query heads of a group before the softmax (R-KV, arXiv
        2505.24133); "mean" gives every query head its own softmax and averages the probabilities
        (SnapKV, arXiv 2404.14469, with one answer per KV head).
    sees : {"past", "causal", "all"}
        Keys that a query attends to. "past": those older than the window's oldest query, and those
        alone; the window's own keys get 0 (R-KV). "causal": those up to the query's own position
        (SnapKV). "all": every held key, younger ones too; with the keys of the window itself these
        are the bidirectional scores of Kara (arXiv 2607.01237), which sums where this averages: the
        ranks are the same.

    Returns
    -------
    Tensor[R, H, N]
        float32 (float64 for float64 keys) probabilities in [0, 1], 0 for filler and for rows whose
        queries see no key. They sum to 1 over `N` if every query sees a key.

    Raises
    ------
    ValueError
        If the shapes do not fit together, or `group` or `sees` is unknown.
    """
    if queries.dim() != 5 or keys.dim() != 4:
        raise ValueError(
            "window_scores expects queries [R, H, G, A, D] and keys [R, H, N, D], got "
            f"{list(queries.shape)} and {list(keys.shape)}; group query heads by their KV head."
        )
    rows, heads, _, window, size = queries.shape
    expected = {
        "keys": (keys, [rows, heads, keys.shape[2], size]),
        "query_positions": (query_positions, [rows, window]),
        "key_positions": (key_positions, [rows, heads, keys.shape[2]]),
    }
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(
                f"window_scores expects {name} {shape} for queries {list(queries.shape)}, "
                f"got {list(tensor.shape)}."
            )
    if window == 0:
        raise ValueError(
            "window_scores expects at least one query, got A = 0; pass the last query."
        )
    if group not in get_args(Group):
        raise ValueError(f"window_scores expects group in {get_args(Group)}, got {group!r}.")
    if sees not in get_args(Sees):
        raise ValueError(f"window_scores expects sees in {get_args(Sees)}, got {sees!r}.")
    if uses_triton(keys):
        from .kernel import window_scores_triton as run
    else:
        run = window_scores_cpu
    return run(queries, keys, query_positions, key_positions, scaling, group=group, sees=sees)
