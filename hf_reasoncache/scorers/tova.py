"""TOVA: attention of the last query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_reasoncache.scorers.base import HeldTokens, Scorer


@dataclass(frozen=True)
class TOVA(Scorer):
    """Transformers are Multi-State RNNs, the TOVA policy (arXiv 2401.06104).

    The paper's: evict the token the newest query attends to least, recent tokens and sinks enjoying
    no protection. Ours: one answer per KV head, the mean over its query group, because heads may
    hold different tokens here (the paper averages over all heads of a layer); several tokens go per
    eviction instead of one per step.
    """

    queries: ClassVar[int] = 1
    joins_layers: ClassVar[bool] = True

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Attention of the newest query."""
        return held.mean_attention(self.queries, sees="causal").float()
