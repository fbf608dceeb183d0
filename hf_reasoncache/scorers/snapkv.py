"""SnapKV: attention of recent queries, smoothed over neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_reasoncache.scorers._checks import at_least, odd
from hf_reasoncache.scorers.base import HeldTokens, Scorer
from hf_reasoncache.scorers.pooling import pool


@dataclass(frozen=True)
class SnapKV(Scorer):
    """SnapKV: LLM Knows What You are Looking for Before Generation (arXiv 2404.14469).

    The paper's: softmax per query head over all keys the query sees, sum over the window, average
    pooling over `kernel` neighbours of the tokens before the window. Ours: applied while decoding,
    to the last queries again and again instead of once to the end of the prompt; the window is 8 as
    in decoding-time comparisons (the paper's is 16 to 64); the mean over the query group gives one
    answer per KV head, and the mean over the window replaces the sum, which ranks the same; the
    pooling divides by the tokens it saw.

    Tokens of the window keep their own attention, unpooled: they see each other and would lift
    their neighbours.

    Attributes
    ----------
    queries : int
        Size of the observation window, in tokens.
    kernel : int
        Width of the average pool, in held tokens; odd.
    """

    queries: int = 8
    kernel: int = 5

    joins_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(self, "queries", self.queries, 1, "the attention needs a query; 8 is the default")
        odd(self, "kernel", self.kernel)

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Mean attention of the window, pooled before it."""
        _, query_positions = held.window(self.queries)
        attention = held.mean_attention(self.queries, sees="causal")
        # Absent queries (-1) are clamped to "no window at all", never to a window from the first
        # token on.
        first = query_positions.where(query_positions >= 0, held.length[:, None]).amin(-1)
        past = held.valid & (held.positions < first[:, None, None])
        return pool(attention, past, self.kernel, "mean").where(past, attention).float()
