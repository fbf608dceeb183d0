"""Keys of small norm attract attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_reasoncache.scorers.base import HeldTokens, Scorer


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv 2406.11430).

    The paper's: keep the keys of low L2 norm. It leaves the first two layers uncompressed, which
    here is a matter of layer budgets. Needs no queries. Where a model normalises its keys (Qwen3,
    Gemma 3), norms differ by the learned weights of that norm alone.
    """

    joins_layers: ClassVar[bool] = True

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Negative L2 norm of the key."""
        return -held.keys.float().norm(dim=-1)
