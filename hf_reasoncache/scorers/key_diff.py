"""KeyDiff: keep the keys that differ most from the average key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from hf_reasoncache.scorers.base import HeldTokens, Scorer


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """KeyDiff: Key Similarity-Based KV Cache Eviction (arXiv 2504.15364).

    The paper's: score each key by its negative cosine similarity to the anchor, the mean of the
    head's normalised keys. Needs no queries. Scores lie in [-1, 1].
    """

    joins_layers: ClassVar[bool] = True

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Negative cosine similarity to the mean direction."""
        unit = F.normalize(held.keys.float(), dim=-1)
        # Filler is zero and adds nothing. The sum points where the mean points, and the cosine asks
        # for no more.
        anchor = F.normalize(unit.sum(2), dim=-1)
        return -(unit @ anchor.unsqueeze(-1)).squeeze(-1)
