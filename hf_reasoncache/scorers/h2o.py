"""H2O: attention accumulated over the whole generation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_reasoncache.scorers._checks import share
from hf_reasoncache.scorers.base import HeldTokens, Scorer

_RECENT = 2.0**32
"""Above any attention, also that of heads that are not here: a head gets at most as much as the
number of queries times the query group."""


@dataclass(frozen=True)
class H2O(Scorer):
    """H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs (arXiv 2306.14048).

    The paper's: rank by the attention a token has received from all queries so far, and give half
    of the cache to the most recent tokens. Ours: the share counts the tokens held when the head is
    scored, staging buffer included; the attention is summed over the query group;
    `attention_decay` and `average`.

    Attributes
    ----------
    recent_ratio : float
        Share in [0, 1] of a head's held tokens, rounded up, that scores above all others of any
        head, the newest highest. 0 leaves recency to the layer's observation window.
    attention_decay : float
        Factor in (0, 1] on the accumulated attention at every new query; 1 is the paper's sum.
    average : bool
        Divide by the (decayed) number of queries that could see the token. A sum favours old
        tokens, which had more queries to collect from; the average is the attention per query,
        noisy for the newest tokens.
    """

    recent_ratio: float = 0.5
    attention_decay: float = 1.0
    average: bool = False

    needs_cumulative_attention: ClassVar[bool] = True
    joins_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        share(self, "recent_ratio", self.recent_ratio, "the paper uses 0.5")
        share(self, "attention_decay", self.attention_decay, "1 is the paper's plain sum")
        if self.attention_decay == 0.0:
            raise ValueError(
                "H2O expects attention_decay > 0, got 0; use TOVA to rank by the last query."
            )

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Accumulated attention, the newest share on top."""
        if held.cumulative_attention is None:
            raise ValueError(
                f"H2O in layer {held.layer} expects the accumulated attention, got none; "
                "a scorer with `needs_cumulative_attention` has the layer sum it at every step."
            )
        received = held.cumulative_attention.float().where(held.valid, 0.0)
        if self.average:
            received = received / self._queries_seen(held)
        recent = (held.count * self.recent_ratio).ceil().long()
        place = torch.arange(received.shape[-1], device=received.device)
        is_recent = (place >= (held.count - recent).unsqueeze(-1)) & held.valid
        return torch.where(is_recent, _RECENT * (1.0 + held.recency), received)

    def _queries_seen(self, held: HeldTokens) -> torch.Tensor:
        """Decayed number of queries since each token came, its own included: `[R, H, N]`."""
        age = (held.length[:, None, None] - held.positions).clamp(min=1).float()
        if self.attention_decay == 1.0:
            return age
        return torch.expm1(age * math.log(self.attention_decay)) / (self.attention_decay - 1.0)
