"""Read and compact several ragged pools as if they were one, in few launches.

The pools of a model's layers lie in memory of their own; the kernels find them by a table of
addresses. There is no path in PyTorch: there, a loop over the pools is as good.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch

from .. import launch

__all__ = ["HeadsOfPools", "Pools"]


Fields = Mapping[str, torch.Tensor]
Kinds = Mapping[str, tuple[torch.dtype, torch.Size]]


@dataclass(frozen=True, eq=False)
class Pools:
    """Where the fields of some pools lie, without keeping them alive.

    Attributes
    ----------
    kinds : mapping of str to (dtype, Size)
        Type and size of a row of each field, the same in every pool.
    statistics : tuple of str
        Fields that are zero in slots that are not used.
    addresses : LongTensor[F + 1, P]
        Of all fields in order, then of the lengths; on the GPU, like what follows.
    sizes : LongTensor[F]
        Words of `word_bytes` in a row of each field.
    cleared : LongTensor[S]
        Numbers of the statistics among the fields.
    known : tuple of weak references
        To these tensors.
    """

    kinds: Kinds
    statistics: tuple[str, ...]
    addresses: torch.Tensor
    sizes: torch.Tensor
    cleared: torch.Tensor
    known: tuple[weakref.ref[torch.Tensor], ...]

    @staticmethod
    def of(
        fields: Sequence[Fields], lengths: Sequence[torch.Tensor], statistics: Sequence[str]
    ) -> Pools:
        """Note where some pools lie.

        Parameters
        ----------
        fields : sequence of mapping from str to Tensor[slots, ...]
            Of each pool; contiguous, all on one GPU.
        lengths : sequence of LongTensor[B, H]
            Slots in use of the heads of each pool, on that GPU; contiguous.
        statistics : sequence of str
            Fields that are zero in slots that are not used.

        Raises
        ------
        ValueError
            If the pools differ in more than their number of slots, or a tensor is not contiguous.
        """
        kinds = [{name: (x.dtype, x.shape[1:]) for name, x in each.items()} for each in fields]
        every = _all(fields, lengths)
        if any(each != kinds[0] for each in kinds) or not all(x.is_contiguous() for x in every):
            raise ValueError(
                "Pools: expected contiguous fields of the same names, types and sizes in every "
                f"pool, got {kinds}."
            )
        names, device = list(kinds[0]), lengths[0].device
        places = [_address(each[name]) for name in names for each in fields]
        places += [_address(each) for each in lengths]
        sizes = [_words(kinds[0], name) for name in names]
        cleared = [names.index(name) for name in statistics]
        numbers = torch.tensor([*places, *sizes, *cleared], device="cpu")
        there = launch.send(numbers, device).split([len(places), len(sizes), len(cleared)])
        return Pools(
            kinds=kinds[0],
            statistics=tuple(statistics),
            addresses=there[0].view(-1, len(lengths)),
            sizes=there[1],
            cleared=there[2],
            known=tuple(map(weakref.ref, every)),
        )

    @property
    def word_bytes(self) -> int:
        """The largest word that rows of all fields are made of."""
        return _word_bytes(self.kinds)

    def words(self, name: str) -> int:
        """How many of them a row of a field has."""
        return _words(self.kinds, name)

    def are(self, fields: Sequence[Fields], lengths: Sequence[torch.Tensor]) -> bool:
        """Whether these are the pools that were noted."""
        every = _all(fields, lengths)
        return len(every) == len(self.known) and all(
            known() is each for known, each in zip(self.known, every, strict=True)
        )

    def of_field(self, name: str) -> torch.Tensor:
        """Return the addresses of a field, LongTensor[P]."""
        return self.addresses[list(self.kinds).index(name)]


_WIDEST = 8
"""Bytes of the widest word that a kernel moves."""


def _word_bytes(kinds: Kinds) -> int:
    return gcd(_WIDEST, *(dtype.itemsize * shape.numel() for dtype, shape in kinds.values()))


def _words(kinds: Kinds, name: str) -> int:
    dtype, shape = kinds[name]
    return dtype.itemsize * shape.numel() // _word_bytes(kinds)


def _all(fields: Sequence[Fields], lengths: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [*(field for each in fields for field in each.values()), *lengths]


def _address(tensor: torch.Tensor) -> int:
    offset = tensor.storage_offset() * tensor.element_size()
    return tensor.untyped_storage().data_ptr() + int(offset)


@dataclass(frozen=True, eq=False)
class HeadsOfPools:
    """Some heads of some pools, and what they hold in order of position; made by `read`.

    Attributes
    ----------
    pools : Pools
    table : LongTensor[4, R, H]
        Pool, place among the heads of its pool, first slot, and slots in use, of each head.
    positions : LongTensor[R, H, N]
        From the row's first token on, ascending; -1 for filler, which comes last.
    offset : LongTensor[R, H, N]
        Slot counted from the head's first one, -1 for filler.
    valid : BoolTensor[R, H, N]
        False for filler.
    """

    pools: Pools
    table: torch.Tensor
    positions: torch.Tensor
    offset: torch.Tensor
    valid: torch.Tensor

    @staticmethod
    def read(pools: Pools, table: torch.Tensor, first: torch.Tensor, tokens: int) -> HeadsOfPools:
        """Find what some heads hold; changes nothing.

        Parameters
        ----------
        pools : Pools
        table : LongTensor[4, R, H]
        first : LongTensor[R]
            Column of each row's first token.
        tokens : int
            What the fullest of the heads holds.
        """
        from .kernel import read_positions

        return HeadsOfPools(pools, table, *read_positions(pools, table, first, tokens))

    def field(self, name: str) -> torch.Tensor:
        """Copy a field, zero where there is filler: Tensor[R, H, N, ...]."""
        from .kernel import gather

        with launch.on_device(self.offset):
            return gather(self, name)

    def write(self, name: str, numbers: torch.Tensor) -> None:
        """Write a statistic of all tokens, Tensor[R, H, N] of the field's type."""
        from .kernel import scatter

        scatter(self, name, numbers)

    def compact(self, keep: torch.Tensor, kept: torch.Tensor) -> None:
        """Move the kept tokens of every head into its first slots, and count them.

        Parameters
        ----------
        keep : BoolTensor[R, H, N]
            False for filler.
        kept : LongTensor[R, H]
            How many that are.
        """
        from .kernel import compact_heads

        compact_heads(self, keep, kept)
