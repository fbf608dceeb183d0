"""Values of large norm move the output most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_reasoncache.scorers.base import HeldTokens, Scorer


@dataclass(frozen=True)
class ValueNorm(Scorer):
    """Keep large values, after Value-Aware Stochastic KV Cache Eviction (arXiv 2606.03928).

    The paper's: a few value states are abnormally large, and losing them sends a reasoning model
    into loops, so VaSE protects them. Ours: the L2 norm of the value ranks *all* tokens, while VaSE
    protects only the largest few and fills the rest by attention or key diversity with random
    sampling. This is the cheapest value-aware baseline, not a reproduction of VaSE.
    Needs no queries.
    """

    joins_layers: ClassVar[bool] = True

    def score(self, held: HeldTokens) -> torch.Tensor:
        """L2 norm of the value."""
        return held.values.float().norm(dim=-1)
