"""Random eviction: the control every scorer has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_reasoncache.scorers._checks import at_least
from hf_reasoncache.scorers.base import HeldTokens, Scorer

MASK = 0xFFFFFFFF


@dataclass(frozen=True, repr=False)
class Random(Scorer):
    """A fixed random number per token: a hash of seed, layer, head and position.

    Variants of Random Attention (arXiv 2609.03430) also protect the first tokens of an answer, some
    768 of them, where a model plans it: `protect_first` does.

    With the prompt protected, random eviction matches the best scorers according to arXiv
    2609.03430. Ours: the numbers come from a counter-based hash, not from a generator, so a token
    keeps its number from one eviction to the next and has the same one alone and in a batch. Needs
    no queries.

    Attributes
    ----------
    seed : int
        Non-negative; another seed is another ranking.
    protect_first : int
        First tokens after the prompt that score above all others, the earliest highest.
    """

    seed: int = 0
    protect_first: int = 0

    def __post_init__(self) -> None:
        at_least(self, "seed", self.seed, 0, "use 0 for the default ranking")
        at_least(self, "protect_first", self.protect_first, 0, "0 protects none")

    def __repr__(self) -> str:
        """Leave out what is not used: journals and profiles know a scorer by this text."""
        more = f", protect_first={self.protect_first}" if self.protect_first else ""
        return f"Random(seed={self.seed}{more})"

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Return uniform numbers in [0, 1), and larger ones for the first tokens of an answer."""
        # 24 bits fill a float32 mantissa exactly: uniform in [0, 1), never rounded up to 1.
        drawn = (token_bits(held, self.seed) >> 8).float() / (1 << 24)
        if not self.protect_first:
            return drawn
        if held.prompt is None:
            raise ValueError(
                f"Random: expected the length of the prompt, to protect {self.protect_first} "
                "tokens after it, got none; use protect_first=0 with this policy."
            )
        place = held.positions - held.prompt[:, None, None]
        first = (place >= 0) & (place < self.protect_first)
        return drawn.where(~first, 1.0 + (self.protect_first - place).float())


def token_bits(held: HeldTokens, seed: int) -> torch.Tensor:
    """Return 32 random bits for each token, LongTensor[R, H_kv, N].

    They depend on seed, layer, head and position alone.
    """
    heads, device = held.positions.shape[1], held.positions.device
    head = torch.arange(held.first_head, held.first_head + heads, device=device)
    state = hashed(hashed(torch.full_like(head, seed & MASK)) ^ held.layer)
    state = hashed(state ^ head)[None, :, None]
    return hashed(state ^ (held.positions & MASK))


def hashed(state: torch.Tensor) -> torch.Tensor:
    """Scramble the low 32 bits of int64 numbers, one to one (the `lowbias32` integer hash)."""
    # Products wrap modulo 2^64, which leaves the low 32 bits right.
    state = ((state ^ (state >> 16)) * 0x7FEB352D) & MASK
    state = ((state ^ (state >> 15)) * 0x846CA68B) & MASK
    return state ^ (state >> 16)
