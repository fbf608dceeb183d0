"""Tokens that several rows have in common, stored once, and which rows read them.

Rows form a tree: everything that some of them have in common is a segment, which never changes, and
each row reads the segments on its way from the root. A segment lives as long as something reads it,
so forks and dropped rows need no bookkeeping: Python counts the references.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from triton_ops.decode_attention import decode_attention
from triton_ops.layout import RaggedLayout, SharedPrefix
from triton_ops.merge_state import merge_state


@dataclass(frozen=True, eq=False)
class Segment:
    """Some tokens of one layer, in order, the same for all heads.

    Attributes
    ----------
    keys, values : Tensor[H_kv, N, D], Tensor[H_kv, N, D_v]
    columns : IntTensor[N]
        Columns of the padded sequence.
    """

    keys: torch.Tensor
    values: torch.Tensor
    columns: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @cached_property
    def layout(self) -> RaggedLayout:
        """The segment as a pool of one row."""
        return RaggedLayout(torch.full((1, self.keys.shape[0]), self.tokens, device="cpu"))

    @cached_property
    def device_length(self) -> torch.Tensor:
        """LongTensor[1, H_kv]: tokens per head, on the segment's device."""
        return self.layout.capacity.to(self.keys.device)

    def joined(self, later: Segment) -> Segment:
        """Return the two as one."""
        return Segment(
            torch.cat([self.keys, later.keys], dim=1),
            torch.cat([self.values, later.values], dim=1),
            torch.cat([self.columns, later.columns]),
        )

    def before(self, column: int) -> Segment:
        """Return the tokens before a column; a copy, so that the others can be freed."""
        count = int((self.columns < column).sum())
        if count == self.tokens:
            return self
        kept = (self.keys[:, :count], self.values[:, :count], self.columns[:count])
        return Segment(*(part.clone() for part in kept))

    def attend(
        self, query: torch.Tensor, scaling: float, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to all tokens with the queries of all rows in one product per KV head (Hydragen,
        arXiv 2402.05099).

        Parameters
        ----------
        query : Tensor[R, H_kv, G, T, D]
        scaling, softcap
            As in `triton_ops.decode_attention`.

        Returns
        -------
        out : Tensor[R, T, H_kv * G, D_v]
        logsumexp : Tensor[R, T, H_kv * G]
        """
        rows, heads, group, steps, size = query.shape
        # To the operation, all queries that read a KV head are one group.
        packed = query.transpose(0, 1).reshape(1, heads, rows * group * steps, 1, size)
        total = query.new_empty(1, 1, packed.shape[1] * packed.shape[2], dtype=torch.float32)
        out = decode_attention(
            packed,
            self.keys.flatten(0, 1),
            self.values.flatten(0, 1),
            self.columns,
            self.layout,
            self.layout.capacity,
            device_length=self.device_length,
            query_positions=None,
            scaling=scaling,
            softcap=softcap,
            logsumexp=total,
        )

        def by_row(x: torch.Tensor) -> torch.Tensor:
            x = x.reshape(heads, rows, group, steps, -1)
            return x.permute(1, 3, 0, 2, 4).reshape(rows, steps, heads * group, -1)

        return by_row(out), by_row(total)[..., 0]


Path = tuple[Segment, ...]


@dataclass(frozen=True, eq=False)
class Trunk:
    """What the rows of a layer read besides their own tokens; changes give a new object.

    Attributes
    ----------
    paths : tuple of Path
        For every row the segments that it reads, oldest first. Rows that read the same tokens read
        the same object.
    """

    paths: tuple[Path, ...] = ()

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
                (part, torch.tensor(rows, device=part.keys.device)) for part, rows in level.values()
            )
            for level in found
        )

    @cached_property
    def readers(self) -> dict[Segment, int]:
        """Segments, and how many rows read each."""
        return {part: len(rows) for level in self.levels for part, rows in level}

    @cached_property
    def as_prefix(self) -> SharedPrefix | None:
        """The one segment that all rows read, if there is no other, for `prefix_attention`."""
        if len(self.readers) != 1 or not all(self.paths):
            return None
        (part,) = self.readers
        return SharedPrefix(
            keys=part.keys.flatten(0, 1),
            values=part.values.flatten(0, 1),
            layout=part.layout,
            length=part.layout.capacity,
            owner=torch.zeros(len(self.paths), dtype=torch.long, device="cpu"),
        )

    def columns(self) -> list[list[int]]:
        """Columns that each row reads here."""
        own = {part: part.columns.tolist() for part in self.readers}
        return [[column for part in path for column in own[part]] for path in self.paths]

    def select_rows(self, rows: torch.Tensor) -> Trunk:
        """Keep, repeat or reorder rows; nothing is copied."""
        return Trunk(tuple(self.paths[row] for row in rows.tolist()))

    def append(self, parts: Sequence[Segment | None], *, join: bool = False) -> Trunk:
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
        return Trunk(tuple(paths))

    def crop(self, column: int) -> Trunk:
        """Leave out all tokens from a column on."""
        kept = {part: part.before(column) for part in self.readers}
        return Trunk(
            tuple(tuple(kept[part] for part in path if kept[part].tokens) for path in self.paths)
        )

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
        for part in self.readers:
            yield from (part.keys, part.values)
