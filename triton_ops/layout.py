"""Where the heads of a ragged pool lie in its flat storage."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from .launch import send

T = TypeVar("T")


@dataclass(frozen=True)
class Bucket:
    """Heads of equal capacity, neighbours in storage, hence one strided view without a copy.

    Attributes
    ----------
    first, count : int
        The bucket's heads are `layout.order[first : first + count]`.
    begin, capacity : int
        Slots `begin` to `begin + count * capacity` of the storage.
    """

    first: int
    count: int
    begin: int
    capacity: int

    def view(self, field: torch.Tensor, used: int | None = None) -> torch.Tensor:
        """View a contiguous per-slot tensor `[slots, ...]` as `[count, used, ...]`.

        Parameters
        ----------
        field : Tensor[slots, ...]
        used : int, optional
            Slots of each head to show at most, the first ones; all by default.
        """
        shown = self.capacity if used is None else min(used, self.capacity)
        sizes = (self.count, shown, *field.shape[1:])
        slot = field.stride(0)
        strides = (self.capacity * slot, *field.stride())
        return field.as_strided(sizes, strides, field.storage_offset() + self.begin * slot)

    def part(self, start: int, stop: int) -> Bucket:
        """Return the heads `start` to `stop - 1` of these."""
        begin = self.begin + start * self.capacity
        return Bucket(self.first + start, stop - start, begin, self.capacity)


@dataclass(frozen=True, eq=False)
class RaggedLayout:
    """Capacity and start of every (row, KV head) in a flat storage.

    Heads are stored in order of capacity, so that heads of equal capacity form one `Bucket`. A pool
    whose heads have few different capacities is attended to in few batched calls.

    Attributes
    ----------
    capacity : LongTensor[B, H_kv]
        Slots each head owns. Lives on the CPU: the shape of the work must be known without a
        synchronisation.
    movable : bool
        Whether the slots may be shared out otherwise later; see `moved`. Lists of work are then as
        long as any shares need them.
    """

    capacity: torch.Tensor
    movable: bool = False

    @cached_property
    def order(self) -> torch.Tensor:
        """LongTensor[B * H_kv]: flat head indices in storage order."""
        return self.capacity.flatten().argsort(stable=True)

    @cached_property
    def rank(self) -> torch.Tensor:
        """LongTensor[B * H_kv]: the inverse of `order`."""
        return self.order.argsort()

    @cached_property
    def start(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: first slot of each head."""
        sizes = self.capacity.flatten()[self.order]
        return (sizes.cumsum(0) - sizes)[self.rank].view_as(self.capacity)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The distinct capacities, smallest first."""
        capacities, counts = self.capacity.flatten()[self.order].unique_consecutive(
            return_counts=True
        )
        buckets, first, begin = [], 0, 0
        for capacity, count in zip(capacities.tolist(), counts.tolist(), strict=True):
            buckets.append(Bucket(first, count, begin, capacity))
            first, begin = first + count, begin + count * capacity
        return tuple(buckets)

    @cached_property
    def slots(self) -> int:
        """Total number of slots."""
        return int(self.capacity.sum())

    def head(self, row: int, head: int, length: torch.Tensor) -> slice:
        """Return the slots in use of a head; `length` `[B, H_kv]` says how many are."""
        start = int(self.start[row, head])
        return slice(start, start + int(length[row, head]))

    @property
    def is_uniform(self) -> bool:
        """Whether all heads have one capacity, so that storage order is (row, head) order."""
        return len(self.buckets) == 1

    @cached_property
    def _derived(self) -> dict[Hashable, tuple[Callable[[RaggedLayout], Any], Any]]:
        return {}

    def derive(self, key: Hashable, make: Callable[[RaggedLayout], T]) -> T:
        """Return what `make` makes of this layout, once per key: copies on a device, lists of work.

        That of a movable layout has a method `copy_`, as tensors do.
        """
        if key not in self._derived:
            # `moved` writes to it, in whatever mode.
            with torch.inference_mode(False):
                self._derived[key] = make, make(self)
        return self._derived[key][1]

    def start_on(self, device: torch.device) -> torch.Tensor:
        """LongTensor[B, H_kv]: `start` on a device, copied once."""
        return self.derive(("start", device), lambda layout: send(layout.start.clone(), device))

    def moved(self, capacity: torch.Tensor) -> RaggedLayout:
        """Return a layout of the same slots with other shares, LongTensor[B, H_kv].

        What has been derived of this layout becomes the other's: the same tensors, written anew, so
        that a captured graph reads there what holds now.

        Raises
        ------
        ValueError
            If this layout is not movable, or the number of heads or of slots is another.
        """
        other = RaggedLayout(capacity, movable=True)
        if not self.movable or (other.slots, capacity.shape) != (self.slots, self.capacity.shape):
            raise ValueError(
                f"moved: expected other shares of {self.slots} slots, movable, for heads "
                f"{list(self.capacity.shape)}, got {other.slots} for {list(capacity.shape)} of a "
                f"layout with movable={self.movable}; make a new layout."
            )
        for key, (make, value) in self._derived.items():
            value.copy_(make(other))
            other._derived[key] = make, value
        self._derived.clear()
        return other


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """Tokens that several rows have in common, stored once.

    Make one object and use it at every step: what is computed for it once is kept with the layout
    of the rows' own tokens.

    Attributes
    ----------
    keys, values : Tensor[slots, D], Tensor[slots, D_v]
        A pool like any other, one row per prefix.
    layout : RaggedLayout
        Capacities `[P, H_kv]` of the `P` prefixes.
    length : LongTensor[P, H_kv]
        Slots in use, on the CPU.
    owner : LongTensor[B]
        Prefix that each row continues, on the CPU; rows of one prefix need not be neighbours.
    key_scales, value_scales : Tensor[slots], optional
        See `decode_attention`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    layout: RaggedLayout
    length: torch.Tensor
    owner: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @cached_property
    def members(self) -> torch.Tensor:
        """LongTensor[B]: rows, those of the first prefix first."""
        return self.owner.argsort(stable=True)

    @cached_property
    def first(self) -> torch.Tensor:
        """LongTensor[P + 1]: `members[first[p] : first[p + 1]]` continue prefix `p`."""
        counts = torch.bincount(self.owner, minlength=self.length.shape[0])
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @cached_property
    def most(self) -> int:
        """Rows of the prefix that has most of them."""
        return int(self.first.diff().max())
