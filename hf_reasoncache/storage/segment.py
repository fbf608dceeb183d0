"""Tokens that several rows have in common, stored once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from triton_ops.decode_attention import decode_attention
from triton_ops.layout import RaggedLayout


@dataclass(frozen=True, eq=False)
class Segment:
    """Some tokens of one layer, in order, the same for all heads.

    Attributes
    ----------
    keys, values : Tensor[H_kv, N, D], Tensor[H_kv, N, D_v]
    columns : IntTensor[N]
        Columns of the padded sequence, in ascending order.
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

    def split(self, marked: torch.Tensor) -> list[tuple[Segment, bool]]:
        """Return the runs of tokens that are marked alike (BoolTensor[N], CPU), and how they are.

        The segment itself if that is all of it, else copies.
        """
        edges = (marked.diff().nonzero()[:, 0] + 1).tolist()
        if not edges:
            return [(self, bool(marked[0]))]
        return [
            (
                Segment(
                    self.keys[:, low:high].clone(),
                    self.values[:, low:high].clone(),
                    self.columns[low:high].clone(),
                ),
                bool(marked[low]),
            )
            for low, high in zip([0, *edges], [*edges, self.tokens], strict=True)
        ]

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
        rows, heads, group, q_len, size = query.shape
        # To the operation, all queries that read a KV head are one group.
        packed = query.transpose(0, 1).reshape(1, heads, rows * group * q_len, 1, size)
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
            x = x.reshape(heads, rows, group, q_len, -1)
            return x.permute(1, 3, 0, 2, 4).reshape(rows, q_len, heads * group, -1)

        return by_row(out), by_row(total)[..., 0]


Path = tuple[Segment, ...]
"""Segments that a row reads, oldest first."""
