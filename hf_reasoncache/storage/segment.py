"""Tokens that several rows have in common, stored once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from hf_reasoncache.storage.forms import Form
from triton_ops.decode_attention import decode_attention
from triton_ops.layout import RaggedLayout


def compact_copy(field: torch.Tensor) -> torch.Tensor:
    """Copy what a segment is to hold, in order of memory: attention reads it as one pool."""
    return field.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, eq=False)
class Segment:
    """Some tokens of one layer, in order, the same for all heads.

    Attributes
    ----------
    form : Form
        What is held of keys and values.
    fields : mapping from str to Tensor[H_kv, N, ...]
        Fields of that form.
    columns : IntTensor[N]
        Columns of the padded sequence, in ascending order.
    """

    form: Form
    fields: Mapping[str, torch.Tensor]
    columns: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.columns.shape[0]

    @property
    def heads(self) -> int:
        """KV heads."""
        return next(iter(self.fields.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(field.nbytes for field in self.fields.values())

    def read(self, name: str) -> torch.Tensor:
        """Return the keys or the values, Tensor[H_kv, N, D]; for reading."""
        return self.form.read(name, self.fields.__getitem__)

    @cached_property
    def operands(self) -> dict[str, torch.Tensor]:
        """What attention reads; see `Form.operands`."""
        return self.form.operands({name: x.flatten(0, 1) for name, x in self.fields.items()})

    @cached_property
    def layout(self) -> RaggedLayout:
        """The segment as a pool of one row."""
        return RaggedLayout(torch.full((1, self.heads), self.tokens, device="cpu"))

    @cached_property
    def device_length(self) -> torch.Tensor:
        """LongTensor[1, H_kv]: tokens per head, on the segment's device."""
        return self.layout.capacity.to(self.columns.device)

    def joined(self, later: Segment) -> Segment:
        """Return the two as one."""
        fields = {
            name: torch.cat([field, later.fields[name]], dim=1)
            for name, field in self.fields.items()
        }
        return replace(self, fields=fields, columns=torch.cat([self.columns, later.columns]))

    def before(self, column: int) -> Segment:
        """Return the tokens before a column; a copy, so that the others can be freed."""
        count = int((self.columns < column).sum())
        return self if count == self.tokens else self._part(0, count)

    def _part(self, low: int, high: int) -> Segment:
        """Copy the tokens `low` to `high - 1`."""
        fields = {name: compact_copy(field[:, low:high]) for name, field in self.fields.items()}
        return replace(self, fields=fields, columns=self.columns[low:high].clone())

    def split(self, marked: torch.Tensor) -> list[tuple[Segment, bool]]:
        """Return the runs of tokens that are marked alike (BoolTensor[N], CPU), and how they are.

        The segment itself if that is all of it, else copies.
        """
        edges = (marked.diff().nonzero()[:, 0] + 1).tolist()
        if not edges:
            return [(self, bool(marked[0]))]
        return [
            (self._part(low, high), bool(marked[low]))
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
            **self.operands,
            positions=self.columns,
            layout=self.layout,
            length=self.layout.capacity,
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
