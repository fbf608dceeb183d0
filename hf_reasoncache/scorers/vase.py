"""VaSE: the values of the widest range, and a sample of the rest by attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_reasoncache.scorers._checks import at_least
from hf_reasoncache.scorers.base import HeldTokens, Scorer
from hf_reasoncache.scorers.random import token_bits

_ABOVE = 32.0
"""Higher than any logarithm of a probability with Gumbel noise of 24 bits."""


@dataclass(frozen=True)
class VaSE(Scorer):
    """Value-Aware Stochastic KV Cache Eviction for Reasoning Models (arXiv 2606.03928).

    The paper's: the `largest` tokens by the range of their value, `max_d v - min_d v`, stay, and of
    the others a sample without replacement, by the mean attention of the last queries; the first
    tokens count as the largest. Ours: the sample is taken by Gumbel noise from a hash of layer,
    head and position instead of a generator, so that a token has the same noise at every eviction,
    alone and in a batch.

    Attributes
    ----------
    largest : int
        Tokens that stay for their values. The paper's code has 200, for budgets of thousands;
        choose a quarter of a small budget.
    sinks : int
        First positions of a row, whose values count as the largest.
    queries : int
        Size of the observation window, in tokens.
    seed : int
        Non-negative; another seed is another sample.
    """

    largest: int = 200
    sinks: int = 4
    queries: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, "largest", self.largest, 0, "0 samples all tokens")
        at_least(self, "sinks", self.sinks, 0, "0 has none")
        at_least(self, "queries", self.queries, 1, "the attention needs a query; the paper uses 64")
        at_least(self, "seed", self.seed, 0, "use 0 for the default sample")

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Range of the largest values above all, else logarithm of the attention plus noise."""
        attention = held.mean_attention(self.queries, sees="causal").float()
        uniform = ((token_bits(held, self.seed) >> 8).float() + 0.5) / (1 << 24)
        tiny = torch.finfo(torch.float32).tiny
        sampled = attention.clamp_min(tiny).log() - (-uniform.log()).log()
        if not self.largest:
            return sampled
        lowest, highest = held.values.float().aminmax(dim=-1)
        width = highest - lowest
        # The range squeezed into [0, 1), which the first tokens alone reach.
        width = (width / (1.0 + width)).masked_fill(held.positions < self.sinks, 1.0)
        width = width.masked_fill(~held.valid, -1.0)
        count = min(self.largest, width.shape[-1])
        bar = width.topk(count, dim=-1).values[..., -1:]
        return sampled.where((width < bar) | ~held.valid, _ABOVE + width)
