"""Bidirectional attention: what the queries of a window see in all of it, younger keys too."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_reasoncache.scorers._checks import at_least
from hf_reasoncache.scorers.base import HeldTokens, Scorer


@dataclass(frozen=True)
class Bidirectional(Scorer):
    """Bidirectional importance of Kara (arXiv 2607.01237), for `SlidingWindowCompressCache`.

    The paper's: the queries of a window attend to all its keys, without a causal mask, so that
    early and late tokens are judged by equally many queries. Ours, where the paper leaves it open:
    every query head has a softmax of its own; the score is the mean over queries and query group.

    `SnapKV(queries=window, kernel=1)` is the same with a causal mask.

    Attributes
    ----------
    queries : int
        Newest queries of the window that are asked. The method asks them all: give it the
        cache's `window`.
    """

    queries: int = 128

    def __post_init__(self) -> None:
        at_least(self, "queries", self.queries, 1, "the method asks all queries of the window")

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Mean attention, younger keys included."""
        return held.mean_attention(self.queries, sees="all").float()
