"""Fair eviction: every span of a text keeps its share, whatever its tokens score.

From "The Pitfalls of KV Cache Compression" (arXiv 2510.00231): spans cover the prompt, each may
keep tokens in proportion to its length, the best of every span stay, and lambda in [0, 1] goes from
the default choice to the fair one. Ours: generated text takes part, in windows; a quota never goes
below what is forced nor above what is held, and the sum is exact; scores are not computed anew
inside a span, so scorers know nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

import torch

from hf_reasoncache.budgets.robustify import largest_remainder, robustify
from hf_reasoncache.messages import shown
from hf_reasoncache.protection.ranges import Spans


@dataclass(frozen=True)
class Fair:
    """How much of a budget goes to the spans of a text by their length instead of by score.

    Attributes
    ----------
    strength : float
        lambda in [0, 1]: 0 is the default choice, 1 gives every span exactly its share.
    spans : Spans, or what `Spans.of` takes, optional
        Spans of the prompt that must not overlap, such as its instructions.
    window : int
        Tokens of a span wherever `spans` says nothing: in generated text, and in the rest of an
        evictable prompt.

    Raises
    ------
    ValueError
        If a value is out of range, or spans overlap.
    """

    strength: float
    spans: Spans | None = None
    window: int = 128

    def __post_init__(self) -> None:
        """Check and normalise."""
        number = isinstance(self.strength, Real) and not isinstance(self.strength, bool)
        if not number or not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"fair: expected a number from 0 to 1, got {shown(self.strength)}.")
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise ValueError(f"fair: expected window as an integer >= 1, got {shown(self.window)}.")
        if self.spans is None:
            return
        object.__setattr__(self, "spans", Spans.of(self.spans))
        for row, ranges in enumerate(self.spans.rows):
            for (start, stop), (following, _) in pairwise(sorted(ranges)):
                if following < stop:
                    raise ValueError(
                        f"fair: expected spans that do not overlap, got ({start}, {stop}) and one "
                        f"from {following} in row {row}."
                    )

    def cuts(self, source: int, prompt: int) -> list[int]:
        """Positions where a span begins, in a prompt of `prompt` tokens, the first one 0.

        Parameters
        ----------
        source : int
            Row of `spans`.
        prompt : int
        """
        given = sorted(self.spans.rows[source]) if self.spans is not None else []
        found, at = [], 0
        for start, stop in [*given, (prompt, prompt)]:
            start, stop = min(start, prompt), min(stop, prompt)
            found += [*range(at, start, self.window)]
            if start < stop:
                found.append(start)
            at = stop
        return found


def share_fairly(
    keep: torch.Tensor,
    scores: torch.Tensor,
    valid: torch.Tensor,
    forced: torch.Tensor,
    spans: torch.Tensor,
    lengths: torch.Tensor,
    strength: float,
) -> torch.Tensor:
    """Choose anew so that every span keeps its quota; as many tokens stay as before.

    A span's quota lies between what the default keeps of it (`strength` 0) and its share of all
    that is kept, in proportion to its length (1), at least what is forced and at most what is held.
    Within a span, forced tokens come first, then those that the default keeps, then the others,
    each by score; of equal scores the later one wins.

    Parameters
    ----------
    keep : BoolTensor[R, H, N]
        The default choice; every forced token is in it.
    scores : Tensor[R, H, N]
    valid, forced : BoolTensor[R, H, N]
        False for filler; tokens that stay whatever happens.
    spans : LongTensor[R, H, N]
        Span of each token, in `[0, S)`; anything for filler.
    lengths : LongTensor[R, S]
        Tokens of each span in the text, evicted ones included.
    strength : float
        In [0, 1].

    Returns
    -------
    BoolTensor[R, H, N]
    """
    rows, heads, places = keep.shape
    number = lengths.shape[1]
    spans = spans.where(valid, number)

    def count(marks: torch.Tensor) -> torch.Tensor:
        empty = torch.zeros(rows, heads, number + 1, dtype=torch.long, device=keep.device)
        return empty.scatter_add_(-1, spans, marks.long())

    held, default = count(valid)[..., :-1], count(keep)[..., :-1]
    bounds = {"low": count(forced)[..., :-1], "high": held}
    demand = lengths[:, None].expand(-1, heads, -1).double()
    fair = robustify(demand, keep.sum(-1), exponent=1.0, **bounds)
    # Both sum to the same number, so their mixture does too.
    mixture = (1.0 - strength) * default.double() + strength * fair
    quota = largest_remainder(mixture, keep.sum(-1, keepdim=True))
    quota = torch.nn.functional.pad(quota, (0, 1))

    # Stable sorts, the least important rule first.
    order = torch.arange(places - 1, -1, -1, device=keep.device).expand_as(spans)
    for rule in (-scores, (~keep).to(torch.uint8), (~forced).to(torch.uint8), spans):
        order = order.gather(-1, rule.gather(-1, order).argsort(dim=-1, stable=True))
    sorted_spans = spans.gather(-1, order)
    sizes = count(torch.ones_like(keep))
    begin = sizes.cumsum(-1) - sizes
    rank = torch.arange(places, device=keep.device) - begin.gather(-1, sorted_spans)
    chosen = rank < quota.gather(-1, sorted_spans)
    return torch.zeros_like(keep).scatter_(-1, order, chosen)
