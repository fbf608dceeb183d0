"""CUR: random projections of keys and values estimate what a token adds to the matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hf_reasoncache.scorers._checks import at_least
from hf_reasoncache.scorers.base import HeldTokens, Scorer
from hf_reasoncache.scorers.random import MASK, hashed

_FIRST = 1e30


@dataclass(frozen=True)
class CUR(Scorer):
    """Leverage of keys and values, as the CUR baseline of VaSE (arXiv 2606.03928) estimates it.

    The paper's: `|k G|^2 |v G|^2` with a Gaussian `G` of `rank` columns that is **drawn again at
    every eviction**, the first tokens kept; after CurDKV (arXiv 2509.15038). With a fixed `G` it is
    much worse. Ours: `G` comes from a hash of seed, layer and the tokens that the row has seen, so
    that a row draws the same alone and in a batch. Needs no queries.

    Attributes
    ----------
    rank : int
        Columns of `G`.
    sinks : int
        First positions of a row, which score above all others.
    resample : bool
        Whether `G` is another one at every eviction.
    seed : int
        Non-negative.
    """

    rank: int = 20
    sinks: int = 4
    resample: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, "rank", self.rank, 1, "the paper uses 20")
        at_least(self, "sinks", self.sinks, 0, "0 has none")
        at_least(self, "seed", self.seed, 0, "use 0 for the default projections")

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Product of the squared norms of the projected key and value."""
        keys, values = held.keys.float(), held.values.float()
        gaussian = self._gaussian(held, max(keys.shape[-1], values.shape[-1]))[:, None]
        parts = [
            (each @ gaussian[..., : each.shape[-1], :]).square().sum(-1) for each in (keys, values)
        ]
        first = (held.positions < self.sinks) & held.valid
        return (parts[0] * parts[1]).where(~first, _FIRST * (held.positions + 1).float())

    def _gaussian(self, held: HeldTokens, size: int) -> torch.Tensor:
        """Tensor[R, size, rank]: normal numbers by Box and Muller's method from hashed counters."""
        seen, device = held.length, held.length.device
        state = hashed(torch.full_like(seen, self.seed & MASK))
        state = hashed(hashed(state ^ held.layer) ^ (seen if self.resample else 0))
        counter = torch.arange(2 * size * self.rank, device=device)
        bits = hashed(state[:, None] ^ hashed(counter)) >> 8
        uniform = ((bits.float() + 0.5) / (1 << 24)).view(len(seen), 2, size, self.rank)
        radius = (-2.0 * uniform[:, 0].log()).sqrt()
        return radius * (2.0 * math.pi * uniform[:, 1]).cos()
