"""What some rows hold, or are about to store, in order of column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from hf_reasoncache.storage.new_tokens import NewTokens


@dataclass(frozen=True, eq=False)
class StoredTokens:
    """Tokens of some rows, those of a head in order of column, then filler.

    Fields are copied when they are asked for.

    Attributes
    ----------
    rows : LongTensor[R]
        On the CPU.
    columns : LongTensor[R, H_kv, N]
        -1 for filler.
    place : LongTensor[R, H_kv, N]
        Where each token lies: its slot in a pool, or its place among new tokens. That of filler is
        a place of the head, whatever lies there.
    take : Callable[[str], Tensor[R, H_kv, N, ...]]
        Copies a field by its name, with anything where there is filler.
    offset : LongTensor[R, H_kv, N] or None
        Slot counted from the head's first one, -1 for filler; None outside of a pool.
    whole : bool
        Whether these are all tokens that the rows hold.
    count : LongTensor[R, H_kv] or None
        How many there are without filler, on the CPU; None where only the device knows.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    place: torch.Tensor
    take: Callable[[str], torch.Tensor]
    offset: torch.Tensor | None = None
    whole: bool = True
    count: torch.Tensor | None = None

    @cached_property
    def valid(self) -> torch.Tensor:
        """BoolTensor[R, H_kv, N]: False for filler."""
        return self.columns >= 0

    @cached_property
    def filler(self) -> bool | None:
        """Whether there is any; None where only the device knows."""
        return None if self.count is None else bool((self.count < self.columns.shape[-1]).any())

    def _without_filler(self, numbers: torch.Tensor, value: float) -> torch.Tensor:
        """Write `value` where there is filler, Tensor[R, H_kv, N, ...]."""
        if self.filler is False:
            return numbers
        mask = ~self.valid
        if numbers.is_cpu and numbers.dim() > 3:
            # A list of few places is faster than a mask of all.
            place = mask.flatten().nonzero()[:, 0]
            numbers.view(-1, *numbers.shape[3:]).index_fill_(0, place, value)
            return numbers
        return numbers.masked_fill_(mask.view(*mask.shape, *[1] * (numbers.dim() - 3)), value)

    def positions(self, first: torch.Tensor) -> torch.Tensor:
        """Count from each row's first real token; filler is -1.

        Parameters
        ----------
        first : LongTensor[R]
            Column of that token, on the device of the columns.

        Returns
        -------
        LongTensor[R, H_kv, N]
        """
        return self._without_filler(self.columns - first[:, None, None], -1)

    def field(self, name: str) -> torch.Tensor:
        """Copy a field, zero where there is filler: Tensor[R, H_kv, N, ...]."""
        return self._without_filler(self.take(name), 0)

    def only_real(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the places of all tokens but filler, and their `numbers` (of the shape of
        `columns`), both flat.
        """
        place, numbers = self.place.flatten(), numbers.flatten()
        if self.filler is not False:
            real = self.valid.flatten().nonzero()[:, 0]
            place, numbers = place.index_select(0, real), numbers.index_select(0, real)
        return place, numbers


def incoming_tokens(new: NewTokens, rows: torch.Tensor) -> StoredTokens:
    """Describe what a first forward brings for some rows, before it is stored.

    Without padding, and if all rows are asked for, keys and values are not copied.

    Parameters
    ----------
    new : NewTokens
    rows : LongTensor[R]
        On the CPU.
    """
    device, heads = new.keys.device, new.keys.shape[1]
    on_device = rows.to(device)
    if new.valid is None:
        held = torch.full((len(rows), 1), new.q_len, device="cpu")
        place = torch.arange(new.q_len, device=device).expand(len(rows), -1)
        columns = place
    else:
        real = new.valid[on_device]
        count = real.sum(-1, keepdim=True)
        held = count.cpu()
        place = (~real).to(torch.uint8).argsort(dim=-1, stable=True)[:, : int(held.max())]
        columns = place.where(torch.arange(place.shape[1], device=device) < count, -1)
    place, columns = (x[:, None].expand(-1, heads, -1) for x in (place, columns))

    def take(name: str) -> torch.Tensor:
        if name not in ("keys", "values"):
            # Statistics begin at zero; only whole numbers are kept of tokens not stored yet.
            return torch.zeros(columns.shape, dtype=torch.int32, device=device)
        source = new.keys if name == "keys" else new.values
        source = source if len(rows) == len(source) else source[on_device]
        if new.valid is None:
            return source
        return source.gather(2, place[..., None].expand(-1, -1, -1, source.shape[-1]))

    return StoredTokens(rows, columns, place, take, count=held.expand(-1, heads))


@dataclass(frozen=True, eq=False)
class IncomingCounts:
    """How much every head would hold if it stored all that a first forward brings.

    Attributes
    ----------
    real : BoolTensor[B, H_kv, T]
        False for padding.
    """

    real: torch.Tensor

    @cached_property
    def length(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: real tokens, on the CPU."""
        return self.real.sum(-1).cpu()

    @property
    def capacity(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: as many slots as tokens."""
        return self.length

    @property
    def least_free(self) -> int:
        """None is free."""
        return 0

    def before(self, rows: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """LongTensor[R, H_kv]: tokens of some rows before a column of each, LongTensor[R]."""
        columns = torch.arange(self.real.shape[-1], device=self.real.device)
        older = columns < column.to(columns.device)[:, None, None]
        return (self.real[rows.to(columns.device)] & older).sum(-1).cpu()
