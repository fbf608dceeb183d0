"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_reasoncache.scorers._checks import at_least
from hf_reasoncache.scorers.base import HeldTokens, Scorer


@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453).

    The paper's: keep the first `sinks` tokens and otherwise the newest. Ours: nothing is
    re-rotated, tokens keep their logical positions.

    Attributes
    ----------
    sinks : int
        Number of first tokens of the row that score above all others; 0 keeps a plain sliding
        window.
    """

    sinks: int = 4

    joins_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(self, "sinks", self.sinks, 0, "the paper uses 4")

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Recency in (0, 1]; sinks above 2."""
        recency = held.recency
        # 3 - recency: above every other score, and of the sinks the first is the last to go.
        return torch.where(held.positions < self.sinks, 3.0 - recency, recency)
