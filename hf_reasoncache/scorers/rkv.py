"""R-KV: attention of recent queries, less redundancy among the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hf_reasoncache.scorers._checks import at_least, odd, share
from hf_reasoncache.scorers.base import HeldTokens, Scorer
from triton_ops.backend import chosen
from triton_ops.redundancy import redundancy
from triton_ops.rkv import find_repeats, rkv_scores
from triton_ops.window_scores import window_scores


@dataclass(frozen=True)
class RKV(Scorer):
    """R-KV: Redundancy-aware KV Cache Compression for Reasoning Models (arXiv 2505.24133).

    `Z = lam * I - (1 - lam) * softmax(R)`. `I`: softmax of the window's logits over the keys older
    than the window, logits max-pooled over the query group, mean over the window, max-pooled over
    `kernel` neighbours. `R`: column mean of the key cosine similarity, the most recent repeat of
    each row exempted.

    The paper's: the formula and the defaults (its code mixes with 0.07). Ours: every batch row is
    scored by its own keys, the cosine matrix is never formed, repeats found at one eviction are not
    sought again at the next, and fewer than `queries` queries are used as they are. Tokens of the
    window itself get `I = 0`; the layer protects them.

    Both terms are normalised over a head's own tokens, hence `comparable`.

    Attributes
    ----------
    lam : float
        Weight of the importance in [0, 1]; 0 ranks by redundancy alone.
    queries : int
        Size of the observation window (`alpha`), in tokens.
    kernel : int
        Width of the max-pool, in held tokens; odd.
    threshold : float
        Cosine in [0, 1] above which two keys repeat each other.
    """

    lam: float = 0.1
    queries: int = 8
    kernel: int = 7
    threshold: float = 0.5

    comparable: ClassVar[Literal["length", "raw"]] = "length"
    keeps_state: ClassVar[bool] = True
    joins_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        share(self, "lam", self.lam, "the paper uses 0.1, its code 0.07")
        at_least(self, "queries", self.queries, 1, "the importance needs a query; the paper uses 8")
        odd(self, "kernel", self.kernel)
        share(self, "threshold", self.threshold, "the paper uses 0.5")

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Importance less redundancy, both normalised over the head."""
        queries, query_positions = held.window(self.queries)
        importance = window_scores(
            queries,
            held.keys,
            query_positions,
            held.positions,
            held.scaling,
            group="max",
            sees="past",
        )
        known, state = None, held.scorer_state
        # Where the kernels run nobody asks whether anything is known: the host would have to wait.
        if state is not None and (chosen(state.device) == "triton" or bool(state.any())):
            known = find_repeats(state, held.positions)
        repeated, repeat = redundancy(held.keys, held.valid, threshold=self.threshold, known=known)
        found = (importance, repeated, repeat, held.positions)
        scores, noted = rkv_scores(*found, lam=self.lam, kernel=self.kernel)
        if state is not None:
            state.copy_(noted)
        return scores
