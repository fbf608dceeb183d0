"""R-KV: attention of recent queries, less redundancy among the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hf_reasoncache.scorers._checks import at_least, odd, share
from hf_reasoncache.scorers.base import HeldTokens, Scorer
from hf_reasoncache.scorers.pooling import pool
from triton_ops.redundancy import GONE, NONE, UNSEEN, redundancy
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
        known = None
        if held.scorer_state is not None and bool(held.scorer_state.any()):
            known = _places(held.scorer_state, held)
        repeated, repeat = redundancy(held.keys, held.valid, threshold=self.threshold, known=known)
        if held.scorer_state is not None:
            held.scorer_state.copy_(_state_of(repeat, held))
        lowest = torch.finfo(repeated.dtype).min
        repeated = held.blank(repeated, lowest).softmax(-1)
        importance = pool(importance, held.valid, self.kernel, "max")
        return (self.lam * importance - (1.0 - self.lam) * repeated).float()


# Entries per token of a table that says where a position is held.
_ENTRIES = 4

# The state is the position of the token's most recent repeat, plus 2; 1 if it has none; 0 if it was
# never scored.


def _state_of(repeat: torch.Tensor, held: HeldTokens) -> torch.Tensor:
    """Turn places among the held tokens into what is kept about each."""
    position = held.positions.gather(-1, repeat.clamp(min=0))
    return held.blank((position + 2).where(repeat != NONE, 1), 0)


def _places(scorer_state: torch.Tensor, held: HeldTokens) -> torch.Tensor:
    """Turn what was kept into places among the held tokens; `GONE` where the repeat is not.

    By a table of positions modulo its size, which is faster than a binary search. Of two tokens
    that share an entry one is not found, and the search is repeated for those that name it.
    """
    count = held.positions.shape[-1]
    last = (_ENTRIES << (count - 1).bit_length()) - 1
    # One more entry, for filler.
    table = scorer_state.new_zeros(*scorer_state.shape[:-1], last + 2)
    order = torch.arange(count, dtype=table.dtype, device=table.device)
    entry = held.blank(held.positions & last, last + 1)
    table.scatter_(-1, entry, order.expand_as(scorer_state))
    wanted = scorer_state.long() - 2
    place = table.gather(-1, wanted & last).long()
    found = held.positions.gather(-1, place) == wanted
    place = place.where(found, GONE).masked_fill_(scorer_state == 1, NONE)
    return place.masked_fill_(scorer_state == 0, UNSEEN)
