"""Token ranges of a batch, as numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_reasoncache.messages import shown

Range = tuple[int, int]

Ranges = Sequence[Range] | Sequence[Sequence[Range]]
"""Token ranges of every row, or those of each row."""


@dataclass(frozen=True)
class Spans:
    """Ranges of tokens in every row of a batch.

    Positions are counted from a row's first real token, so left padding does not move them.

    Attributes
    ----------
    rows : tuple of tuple of (int, int)
        For each row, its ranges `(start, stop)`, `0 <= start < stop`. A single row stands for every
        row of a batch.
    tokens : tuple of int or None
        Tokens of each row's prompt, where that is known: a cache then refuses a prompt of another
        length, in which the ranges would point at other tokens.

    Raises
    ------
    ValueError
        If a range is not a pair of integers with `0 <= start < stop`, or reaches past its row's
        tokens.
    """

    rows: tuple[tuple[Range, ...], ...]
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check and normalise."""
        rows = tuple(tuple(_range(each) for each in _items(row)) for row in _items(self.rows))
        if not rows:
            raise ValueError("spans: expected at least one row, got none; pass one per prompt.")
        object.__setattr__(self, "rows", rows)
        if self.tokens is None:
            return
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if len(self.tokens) != len(rows):
            raise ValueError(
                f"spans: expected the prompt tokens of {len(rows)} rows, got {len(self.tokens)}."
            )
        for row, (ranges, tokens) in enumerate(zip(rows, self.tokens, strict=True)):
            expect_inside(row, ranges, tokens)

    @staticmethod
    def of(value: Any) -> Spans:
        """Make spans of what users pass.

        Parameters
        ----------
        value : Spans, sequence of (int, int), or sequence of such sequences
            As it is; the ranges of every row; the ranges of each row.
        """
        if isinstance(value, Spans):
            return value
        items = _items(value)
        if items and all(_is_pair(item) for item in items):
            return Spans((tuple(items),))
        return Spans(tuple(items))

    def row(self, index: int) -> tuple[Range, ...]:
        """Ranges of one row."""
        return self.rows[index]

    @cached_property
    def merged(self) -> tuple[tuple[Range, ...], ...]:
        """The same tokens as ranges in order that neither overlap nor touch."""
        return tuple(_merge(row) for row in self.rows)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens in the spans of each row, each counted once."""
        return tuple(sum(stop - start for start, stop in row) for row in self.merged)

    def sources(self, batch: int) -> list[int]:
        """Which row of these spans each of `batch` rows has.

        `generate` repeats every prompt beside itself for beams and several samples, so a batch may
        be a multiple of the rows.

        Raises
        ------
        ValueError
            If it is none.
        """
        if batch % len(self.rows):
            raise ValueError(
                f"spans: expected a batch of {len(self.rows)} rows or a multiple of it (beams, "
                f"several samples), got {batch}; pass the ranges of each row, or of a single one "
                "for all."
            )
        repeats = batch // len(self.rows)
        return [row // repeats for row in range(batch)]


def expect_inside(row: int, ranges: Sequence[Range], tokens: int) -> None:
    """Raise ValueError if a range reaches past the `tokens` tokens of a row's prompt."""
    for start, stop in ranges:
        if stop > tokens:
            raise ValueError(
                f"spans: expected ranges within the {tokens} prompt tokens of row {row}, got "
                f"({start}, {stop}); positions are counted from the first real token, padding not "
                "included."
            )


def _merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return tuple(merged)


def _items(value: Any) -> list[Any]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ValueError(
            "spans: expected Spans, token ranges (start, stop), or a list of ranges for each row, "
            f"got {shown(value)}; hf_reasoncache.protection.spans finds the tokens of a text."
        )
    return list(value)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(end, int) and not isinstance(end, bool) for end in value)
    )


def _range(value: Any) -> Range:
    if not _is_pair(value) or not 0 <= value[0] < value[1]:
        raise ValueError(
            f"spans: expected a range (start, stop) with 0 <= start < stop, got {shown(value)}."
        )
    return value[0], value[1]
