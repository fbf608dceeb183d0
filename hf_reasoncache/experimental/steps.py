"""Cuts a chain of thought into steps while it is written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt

from transformers import PreTrainedTokenizerBase

from hf_reasoncache.arguments import require_int


@dataclass(frozen=True)
class Boundaries:
    r"""Where a step ends.

    Attributes
    ----------
    patterns : tuple of str
        Regular expressions; a token that completes a match in the text is the last one of its step.
        The default, an empty line, is what reasoning models put between their steps.
    tokens : tuple of int
        Ids that end a step whatever their text.
    minimum : int
        Fewest tokens of a step: an earlier boundary is passed over.
    maximum : int
        Most tokens of a step; then it ends anywhere.
    look_back : int
        Latest tokens whose text the patterns see: the longest boundary, in tokens.
    """

    patterns: tuple[str, ...] = (r"\n\n",)
    tokens: tuple[int, ...] = ()
    minimum: int = 1
    maximum: int = 512
    look_back: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.patterns, str) or not (self.patterns or self.tokens):
            raise ValueError(
                "boundaries: expected patterns or tokens (tuples) that end a step, got "
                f"patterns={self.patterns!r}, tokens={self.tokens!r}."
            )
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"patterns: expected regular expressions, got {pattern!r}: {error}."
                ) from error
        require_int("minimum", self.minimum, low=1)
        require_int("maximum", self.maximum, low=self.minimum)
        require_int("look_back", self.look_back, low=1)


@dataclass(frozen=True)
class Step:
    """Tokens from `start` up to, not including, `stop`: columns of a row.

    Attributes
    ----------
    start, stop : int
    ids : tuple of int
    """

    start: int
    stop: int
    ids: tuple[int, ...] = field(repr=False)

    @cached_property
    def counts(self) -> Counter[int]:
        """How often each token occurs."""
        return Counter(self.ids)

    @cached_property
    def norm(self) -> float:
        """Length of the count vector."""
        return sqrt(sum(count * count for count in self.counts.values()))


def lexical_similarity(one: Step, other: Step) -> float:
    """Cosine of two steps' token-count vectors, from 0 to 1: blind to order."""
    few, many = sorted((one.counts, other.counts), key=len)
    return sum(n * many[token] for token, n in few.items()) / (one.norm * other.norm)


class StepSegmenter:
    """Cuts one row into steps, token by token.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    boundaries : Boundaries
    start : int
        Column of the first token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, boundaries: Boundaries, start: int
    ) -> None:
        self.tokenizer, self.boundaries, self.start = tokenizer, boundaries, start
        self._patterns = [re.compile(pattern) for pattern in boundaries.patterns]
        self._ids: list[int] = []

    def push(self, token: int) -> Step | None:
        """Add a token; return the step that it ends, if it does."""
        self._ids.append(token)
        if not self._ends():
            return None
        step = Step(self.start, self.start + len(self._ids), tuple(self._ids))
        self.start, self._ids = step.stop, []
        return step

    def _ends(self) -> bool:
        limits = self.boundaries
        if len(self._ids) < limits.minimum:
            return False
        if self._ids[-1] in limits.tokens or len(self._ids) >= limits.maximum:
            return True
        if not self._patterns:
            return False
        tail = self._ids[-limits.look_back :]
        text, before = (str(self.tokenizer.decode(ids)) for ids in (tail, tail[:-1]))
        # The newest token must complete the match: an older one was judged when it was new.
        return any(
            match.end() > len(before)
            for pattern in self._patterns
            for match in pattern.finditer(text)
        )


def segment(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Iterable[int], boundaries: Boundaries
) -> list[Step]:
    """Cut a whole sequence; what follows the last boundary is in no step."""
    segmenter = StepSegmenter(tokenizer, boundaries, 0)
    return [step for token in ids if (step := segmenter.push(int(token))) is not None]
