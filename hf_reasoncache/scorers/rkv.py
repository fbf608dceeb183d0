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
    keeps_notes: ClassVar[bool] = True

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
        if held.notes is not None and bool(held.notes.any()):
            known = _places(held.notes, held)
        repeated, repeat = redundancy(held.keys, held.valid, threshold=self.threshold, known=known)
        if held.notes is not None:
            held.notes.copy_(_notes(repeat, held))
        lowest = torch.finfo(repeated.dtype).min
        repeated = held.blank(repeated, lowest).softmax(-1)
        importance = pool(importance, held.valid, self.kernel, "max")
        return (self.lam * importance - (1.0 - self.lam) * repeated).float()


# Entries per token of a table that says where a position is held.
_ENTRIES = 4

# A note is the position of the token's most recent repeat, plus 2; 1 if it has none; 0 if it was
# never scored.


def _notes(repeat: torch.Tensor, held: HeldTokens) -> torch.Tensor:
    """Turn places among the held tokens into notes."""
    position = held.positions.gather(-1, repeat.clamp(min=0))
    return held.blank((position + 2).where(repeat != NONE, 1), 0)


def _places(notes: torch.Tensor, held: HeldTokens) -> torch.Tensor:
    """Turn notes into places among the held tokens; `GONE` where the repeat is not.

    By a table of positions modulo its size, which is faster than a binary search. Of two tokens
    that share an entry one is not found, and the search is repeated for those that name it.
    """
    count = held.positions.shape[-1]
    last = (_ENTRIES << (count - 1).bit_length()) - 1
    # One more entry, for filler.
    table = notes.new_zeros(*notes.shape[:-1], last + 2)
    order = torch.arange(count, dtype=table.dtype, device=table.device)
    entry = held.blank(held.positions & last, last + 1)
    table.scatter_(-1, entry, order.expand_as(notes))
    wanted = notes.long() - 2
    place = table.gather(-1, wanted & last).long()
    found = held.positions.gather(-1, place) == wanted
    place = place.where(found, GONE).masked_fill_(notes == 1, NONE)
    return place.masked_fill_(notes == 0, UNSEEN)
