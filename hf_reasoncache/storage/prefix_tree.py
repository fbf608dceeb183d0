"""Which rows read which segments.

Rows form a tree: everything that some of them have in common is a segment, which never changes, and
each row reads the segments on its way from the root. A segment lives as long as something reads it,
so forks and dropped rows need no bookkeeping: Python counts the references.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hf_reasoncache.storage.segment import Path, Segment
from triton_ops.layout import SharedPrefix
from triton_ops.merge_state import merge_state


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """What the rows of a layer read besides their own tokens; changes give a new object.

    Attributes
    ----------
    paths : tuple of Path
        For every row the segments that it reads, oldest first. Rows that read the same tokens read
        the same object.
    aside : tuple of Path
        For every row the segments that its attention mask hides.
    """

    paths: tuple[Path, ...] = ()
    aside: tuple[Path, ...] = ()

    @staticmethod
    def of_rows(count: int) -> PrefixTree:
        """Begin with rows that read nothing."""
        return PrefixTree(((),) * count, ((),) * count)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """LongTensor[B]: tokens per head that each row reads here."""
        return torch.tensor(
            [sum(part.tokens for part in path) for path in self.paths], device="cpu"
        )

    @cached_property
    def levels(self) -> tuple[tuple[tuple[Segment, torch.Tensor], ...], ...]:
        """Segments with the rows that read them (LongTensor on the segment's device), those that
        stand at the same place of their paths together.
        """
        found: list[dict[int, tuple[Segment, list[int]]]] = []
        for row, path in enumerate(self.paths):
            found += [{} for _ in range(len(path) - len(found))]
            for level, part in zip(found, path, strict=False):
                level.setdefault(id(part), (part, []))[1].append(row)
        return tuple(
            tuple(
                (part, torch.tensor(rows, device=part.columns.device))
                for part, rows in level.values()
            )
            for level in found
        )

    @cached_property
    def readers(self) -> dict[Segment, int]:
        """Segments, and how many rows read each."""
        return {part: len(rows) for level in self.levels for part, rows in level}

    @property
    def segments(self) -> list[Segment]:
        """All segments, those that are hidden too."""
        return list(dict.fromkeys(part for path in (*self.paths, *self.aside) for part in path))

    @cached_property
    def as_prefix(self) -> SharedPrefix | None:
        """The one segment that all rows read, if there is no other, for `prefix_attention`."""
        if len(self.readers) != 1 or not all(self.paths):
            return None
        (part,) = self.readers
        return SharedPrefix(
            **part.operands,
            layout=part.layout,
            length=part.layout.capacity,
            owner=torch.zeros(len(self.paths), dtype=torch.long, device="cpu"),
        )

    def columns(self) -> list[list[int]]:
        """Columns that each row reads here."""
        own = {part: part.columns.tolist() for part in self.readers}
        return [[column for part in path for column in own[part]] for path in self.paths]

    def select_rows(self, rows: torch.Tensor) -> PrefixTree:
        """Keep, repeat or reorder rows; nothing is copied."""
        paths, aside = self.paths, self.aside
        return PrefixTree(
            tuple(paths[row] for row in rows.tolist()), tuple(aside[row] for row in rows.tolist())
        )

    def with_last(self, path: Path) -> PrefixTree:
        """Give the last row another path."""
        return PrefixTree((*self.paths[:-1], path), (*self.aside[:-1], ()))

    def hide(self, hidden: torch.Tensor) -> PrefixTree:
        """Leave out what a mask hides, and take in again what it shows, BoolTensor[B, T]."""
        known: dict[Segment, torch.Tensor] = {}
        made: dict[tuple[Segment, bytes], list[tuple[Segment, bool]]] = {}
        paths, aside = [], []
        for row, *parts in zip(hidden.cpu(), self.paths, self.aside, strict=True):
            pieces: list[tuple[Segment, bool]] = []
            for part in (*parts[0], *parts[1]):
                if part not in known:
                    known[part] = part.columns.long().cpu()
                marked = row[known[part]]
                key = (part, marked.numpy().tobytes())
                if key not in made:
                    made[key] = part.split(marked)
                pieces += made[key]
            if any(was for _, was in pieces) or parts[1]:
                pieces.sort(key=lambda piece: int(piece[0].columns[0]))
            paths.append(tuple(part for part, gone in pieces if not gone))
            aside.append(tuple(part for part, gone in pieces if gone))
        same = tuple(paths) == self.paths and tuple(aside) == self.aside
        return self if same else PrefixTree(tuple(paths), tuple(aside))

    def append(self, parts: Sequence[Segment | None], *, join: bool = False) -> PrefixTree:
        """Lengthen the paths of rows by one segment each, or not.

        Parameters
        ----------
        parts : sequence of Segment or None
            One entry per row; rows that get the same tokens get the same object.
        join : bool
            Whether a segment becomes one with that before it, if the same rows read both: fewer
            segments are faster to read.
        """
        ends = [path[-1] if path else None for path in self.paths]
        pairs = list(zip(ends, parts, strict=True))
        joined = {
            (end, part): end.joined(part)
            for end, part in set(pairs)
            if join and end and part and ends.count(end) == pairs.count((end, part))
        }
        paths = []
        for path, pair in zip(self.paths, pairs, strict=True):
            if pair in joined:
                paths.append((*path[:-1], joined[pair]))
            else:
                paths.append(path if pair[1] is None else (*path, pair[1]))
        return PrefixTree(tuple(paths), self.aside)

    def crop(self, column: int) -> PrefixTree:
        """Leave out all tokens from a column on."""
        kept = {part: part.before(column) for part in self.segments}

        def cropped(paths: tuple[Path, ...]) -> tuple[Path, ...]:
            return tuple(tuple(kept[x] for x in path if kept[x].tokens) for path in paths)

        return PrefixTree(cropped(self.paths), cropped(self.aside))

    def join_attention(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Join the attention of rows to their own tokens with that to all that they share.

        Parameters
        ----------
        query : Tensor[B, H_kv, G, T, D]
        out, logsumexp : Tensor[B, T, H_q, D_v], Tensor[B, T, H_q]
        scaling, softcap
            As in `triton_ops.decode_attention`.

        Returns
        -------
        Tensor[B, T, H_q, D_v]
        """
        for level in self.levels:
            if len(level[0][1]) == len(self.paths):
                found, total = level[0][0].attend(query, scaling, softcap)
            else:
                found = torch.zeros_like(out)
                total = torch.full_like(logsumexp, -torch.inf)
                for part, rows in level:
                    found[rows], total[rows] = part.attend(query[rows], scaling, softcap)
            out, logsumexp = merge_state(out, logsumexp, found, total)
        return out

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the keys and values of all segments."""
        for part in self.segments:
            yield from part.fields.values()
