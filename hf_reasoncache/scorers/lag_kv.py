"""LagKV: how unusual a chunk of tokens looks to the chunk after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from hf_reasoncache.scorers._checks import at_least
from hf_reasoncache.scorers.base import HeldTokens, Scorer


@dataclass(frozen=True)
class LagKV(Scorer):
    """LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important.

    The paper's (arXiv 2504.04704): behind the sinks, cut the tokens into chunks of `lag`. Scale
    each channel of a chunk by the minimum and maximum of that channel in the *next* chunk, take
    each token's standard deviation over channels, softmax over the chunk; average keys' and values'
    scores; rank within the chunk. Sinks, the last whole chunk and the tokens after it have no
    successor and are kept. Defaults are those of the public kvpress implementation.

    Ours: chunks are made of the tokens a head still holds, so they come closer to a plain window
    the smaller the budget is (below `sinks + 2 * lag` tokens the newest win); among the kept, the
    newest score highest; a channel that is constant in the next chunk contributes 0 instead of a
    division by zero. Needs no queries.

    Attributes
    ----------
    sinks : int
        Oldest held tokens that score above all others.
    lag : int
        Tokens per chunk, at least 2.
    """

    sinks: int = 4
    lag: int = 128

    joins_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(self, "sinks", self.sinks, 0, "the default is 4")
        at_least(self, "lag", self.lag, 2, "a chunk of one token has no ranks; the default is 128")

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Rank within the chunk in [0, 1); sinks and newest tokens above 1."""
        place = torch.arange(held.valid.shape[-1], device=held.valid.device)
        kept = torch.where(place < self.sinks, 4.0 - held.recency, 1.0 + held.recency)
        chunks = (held.count - self.sinks).div(self.lag, rounding_mode="floor")
        ranked_until = (self.sinks + (chunks - 1) * self.lag).unsqueeze(-1)
        ranked = (place >= self.sinks) & (place < ranked_until)
        width = max(0, int(ranked.sum(-1).max()))
        if width == 0:
            return kept
        unusual = (self._unusual(held.keys, width) + self._unusual(held.values, width)) / 2
        rank = unusual.argsort(dim=-1, stable=True).argsort(dim=-1) / self.lag
        rank = F.pad(rank.flatten(2), (self.sinks, place.numel() - self.sinks - width))
        return torch.where(ranked, rank, kept)

    def _unusual(self, states: torch.Tensor, width: int) -> torch.Tensor:
        """Score the first `width` tokens behind the sinks, in [0, 1]: `[R, H, C, lag]`."""
        whole = states[:, :, self.sinks : self.sinks + width + self.lag].float()
        chunks = whole.unflatten(2, (-1, self.lag))
        lowest, highest = chunks[:, :, 1:].aminmax(dim=-2, keepdim=True)
        span = highest - lowest
        scaled = ((chunks[:, :, :-1] - lowest) / span).where(span > 0, 0.0)
        return scaled.std(dim=-1).softmax(-1)
