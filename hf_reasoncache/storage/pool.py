"""The ragged key/value pool of one layer: storage that knows no policy and no form of keys.

Every (row, KV head) owns a stretch of one flat buffer and uses a prefix of it. Tokens are appended
in place; evicted tokens leave holes that are filled from the end, so slot order says nothing about
age and whoever needs age reads `positions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_reasoncache.storage.held_positions import HeldPositions
from triton_ops.append import append
from triton_ops.compact import compact
from triton_ops.launch import send
from triton_ops.layout import RaggedLayout


def ordinary_tensors() -> torch.inference_mode:
    """Allocate, under inference mode too, tensors that may be written to outside of it.

    A cache outlives the call that filled it, and inference tensors are read-only elsewhere.
    """
    return torch.inference_mode(False)


class RaggedPool:
    """What is held of the tokens of one layer, their positions and statistics, per slot.

    Invariants: `0 <= length <= capacity` for every head; the used slots of a head are its first
    `length` ones; every slot holds finite numbers, used or not, and statistics are zero in unused
    ones.

    Attributes
    ----------
    fields : dict[str, Tensor[slots, ...]]
        What is held of keys and values, "positions" (int32 columns of the padded sequence) and the
        statistics. What is done to one is done to all.
    statistics : tuple of str
        Names of the fields that are zero in unused slots, and begin at zero.
    layout : RaggedLayout
    length : LongTensor[B, H_kv]
        Tokens held; on the CPU, so that no step has to synchronise.
    shortest, longest, least_free : int
        Extremes over the heads of tokens held and of free slots. Plain numbers, kept up to date,
        because every layer asks for them at every step.
    is_even : bool
        Whether all heads have the same capacity and hold equally many tokens.
    """

    _device_length: torch.Tensor | None = None

    def __init__(
        self,
        capacity: torch.Tensor,
        like: Mapping[str, torch.Tensor],
        statistics: Mapping[str, torch.dtype] | None = None,
        *,
        movable: bool = False,
    ) -> None:
        """Allocate an empty pool.

        Parameters
        ----------
        capacity : LongTensor[B, H_kv]
        like : mapping from str to Tensor[n, ...]
            Some tokens: names, sizes, types and device of what is held of each; not stored.
        statistics : mapping from str to dtype, optional
            Names and types of further numbers to keep per slot.
        movable : bool
            Whether heads may get other shares of the same slots; `relayout` then moves tokens
            inside this storage.
        """
        self.layout = RaggedLayout(capacity, movable)
        self._set_length(torch.zeros_like(capacity))
        self.statistics = tuple(statistics or ())
        slots, device = self.layout.slots, next(iter(like.values())).device
        with ordinary_tensors():
            self.fields = {
                # Zeros, not empty: attention reads unused slots with weight 0, and 0 * NaN is NaN.
                name: torch.zeros(slots, *x.shape[1:], dtype=x.dtype, device=device)
                for name, x in like.items()
            }
            self.fields["positions"] = torch.full((slots,), -1, dtype=torch.int32, device=device)
            for name, dtype in (statistics or {}).items():
                self.fields[name] = torch.zeros(slots, dtype=dtype, device=device)

    @property
    def held_fields(self) -> dict[str, torch.Tensor]:
        """The fields that hold keys and values, in whatever form."""
        others = ("positions", *self.statistics)
        return {name: field for name, field in self.fields.items() if name not in others}

    @property
    def device(self) -> torch.device:
        """Where the pool is."""
        return self.fields["positions"].device

    def _set_length(self, length: torch.Tensor) -> None:
        self.note_length(length)
        if self._device_length is not None:
            if self._device_length.shape == length.shape:
                self._device_length.copy_(length, non_blocking=True)
            else:
                self._device_length = None

    def note_length(self, length: torch.Tensor) -> None:
        """Count what the device has stored or moved and counted itself, LongTensor[B, H_kv]."""
        self.length = length
        self.shortest, self.longest = int(length.min()), int(length.max())
        self.least_free = int((self.layout.capacity - length).min())
        self.is_even = self.shortest == self.longest and self.layout.is_uniform

    @property
    def device_length(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: `length` on the pool's device.

        Made when it is first asked for, and then one tensor that is written to, as long as the pool
        has the same heads: kernels and captured graphs read it where it is.
        """
        if self._device_length is None:
            with ordinary_tensors():
                self._device_length = send(self.length.clone(), self.device)
        return self._device_length

    @property
    def capacity(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: slots owned by each head."""
        return self.layout.capacity

    def append(
        self,
        tokens: Mapping[str, torch.Tensor],
        columns: torch.Tensor | int,
        keep: torch.Tensor | None = None,
        **statistics: torch.Tensor,
    ) -> None:
        """Append tokens to every head; statistics not given start at zero.

        Parameters
        ----------
        tokens : mapping from str to Tensor[B, H_kv, T, ...]
            What is held of each, by the names of the fields.
        columns : LongTensor[T] or [B, H_kv, T], or int
            Position of each token; a number is the position of all, which is faster for one.
        keep : BoolTensor[B, H_kv, T], optional
            Tokens to store (padding is not); all by default.
        **statistics : Tensor[B, H_kv, T]

        Raises
        ------
        ValueError
            If a head has fewer free slots than tokens to store.
        """
        batch, heads, q_len = next(iter(tokens.values())).shape[:3]
        added = None if keep is None else keep.sum(-1).cpu()
        if q_len > self.least_free and (
            added is None or bool((self.length + added > self.capacity).any())
        ):
            raise ValueError(
                f"RaggedPool.append: expected room for {q_len} tokens in every head, got "
                f"{self.least_free} free slots; relayout the pool first."
            )
        one_column = isinstance(columns, int) or columns.numel() == 1
        single = q_len == 1 and one_column and keep is None and not statistics
        if single and self._device_length is not None:
            self.append_single(tokens, columns)
            return
        new = {**tokens, "positions": columns, **statistics}
        if added is None and self.is_even and self._device_length is None:
            fresh = slice(self.longest, self.longest + q_len)
            for name, value in new.items():
                field = self.fields[name]
                field.view(batch, heads, -1, *field.shape[1:])[:, :, fresh] = value
        else:
            self._scatter(new, keep, (batch, heads, q_len))
        if added is None:
            self.count_appended(q_len)
            if self._device_length is not None:
                self._device_length.add_(q_len)
        else:
            self._set_length(self.length + added)

    def append_single(
        self,
        tokens: Mapping[str, torch.Tensor],
        column: torch.Tensor | int,
        asked: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Append one token to every head, which the device counts; see `triton_ops.append`."""
        stored = (*(self.fields[name] for name in tokens), self.fields["positions"])
        start = self.layout.start_on(self.device)
        append(stored, start, self.device_length, tuple(tokens.values()), column, asked)
        self.count_appended(1)

    def count_appended(self, q_len: int) -> None:
        """Count tokens that every head has got, on the host: a captured graph did so on its own."""
        self.length = self.length + q_len
        self.shortest += q_len
        self.longest += q_len
        self.least_free -= q_len

    def _scatter(
        self, new: dict[str, Any], keep: torch.Tensor | None, shape: tuple[int, int, int]
    ) -> None:
        """Write new tokens, of `shape` `(B, H_kv, T)`, behind the last one of each head."""
        positions = self.fields["positions"].new_empty(shape)
        positions[:] = new["positions"]
        new, device = new | {"positions": positions}, positions.device
        if self._device_length is None:
            tail = send(self.layout.start + self.length, device)[..., None]
        else:
            tail = (self.layout.start_on(device) + self._device_length)[..., None]
        if keep is None:
            slots = (tail + torch.arange(positions.shape[-1], device=device)).flatten()
        else:
            slots = (tail + keep.cumsum(-1) - 1)[keep]
        for name, value in new.items():
            field = self.fields[name]
            flat = value.reshape(-1, *field.shape[1:]) if keep is None else value[keep]
            field.index_copy_(0, slots, flat)

    def slots(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of the tokens that some rows hold, in slot order.

        Parameters
        ----------
        rows : LongTensor[R]
            On the CPU.

        Returns
        -------
        slots : LongTensor[R, H_kv, N]
            On the pool's device; `N` is the largest number held; filler repeats the head's first
            slot.
        offset : LongTensor[R, H_kv, N]
            Slot counted from the head's first one, -1 for filler.
        """
        device, length = self.device, self.length[rows]
        # A head without any capacity has its start at the end of the storage.
        start = self.layout.start[rows].clamp_max(max(self.layout.slots - 1, 0))
        place = torch.arange(max(int(length.max()), 0), device=device)
        # Sent at once; what has a number per token is made where it is needed.
        start, length = send(torch.stack([start, length]), device)[..., None]
        offset = place.masked_fill(place >= length, -1)
        return torch.maximum(start + offset, start), offset

    def take(self, name: str, slots: torch.Tensor) -> torch.Tensor:
        """Copy a field of some slots: Tensor `[*slots.shape, ...]`."""
        field = self.fields[name]
        # Whole rows, 10 times faster on a CPU than indexing.
        return field.index_select(0, slots.flatten()).view(*slots.shape, *field.shape[1:])

    def compact(
        self,
        rows: torch.Tensor,
        slots: torch.Tensor,
        offset: torch.Tensor,
        keep: torch.Tensor,
        kept: torch.Tensor | None = None,
    ) -> None:
        """Evict in place all tokens of `rows` that are not kept; see `triton_ops.compact`.

        `kept`, LongTensor[R, H_kv] on the CPU, is how many tokens that are, if it is known.
        """
        compact(self.fields.values(), slots, offset, keep)
        kept = keep.sum(-1).cpu() if kept is None else kept
        self._clear(slots, offset, kept)
        self._set_length(self.length.index_put((rows,), kept))

    def _clear(self, slots: torch.Tensor, offset: torch.Tensor, used: torch.Tensor) -> None:
        """Set statistics to zero in those slots of some heads that are not their first `used`."""
        if not self.statistics:
            return
        used = send(used, offset.device)[..., None]
        if offset.is_cpu:
            unused = slots[offset >= used]
            for name in self.statistics:
                self.fields[name].index_fill_(0, unused, 0)
            return
        # Filler stands for the head's first slot.
        unused = offset.clamp_min(0) >= used
        for name in self.statistics:
            kept = self.take(name, slots).masked_fill_(unused, 0)
            self.fields[name].index_copy_(0, slots.flatten(), kept.flatten())

    def drop_all(self, rows: torch.Tensor) -> None:
        """Let all tokens of some rows (LongTensor[R], CPU) go; statistics stay as they are."""
        self._set_length(self.length.index_fill(0, rows, 0))

    def drop_newest(self, count: int) -> None:
        """Take back the last `count` appended tokens of every head.

        Right only when no compaction came in between: a compaction moves the newest tokens.
        """
        slots, offset = self.slots(torch.arange(self.length.shape[0], device="cpu"))
        self._set_length((self.length - count).clamp_min(0))
        self._clear(slots, offset, self.length)

    def relayout(self, capacity: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Give heads other capacities, or take other rows, in a new storage.

        In this one where it is movable and has as many slots as are wanted: every tensor stays.

        Parameters
        ----------
        capacity : LongTensor[B', H_kv]
            At least the length of each head.
        rows : LongTensor[B'], optional
            Row of this pool that each new row copies; the same rows by default.
        """
        if rows is None:
            if self.layout.movable and int(capacity.sum()) == self.layout.slots:
                self._move(capacity)
                return
            rows = torch.arange(self.length.shape[0], device="cpu")
        slots, offset = self.slots(rows)
        old, used = self.fields, offset >= 0
        layout = RaggedLayout(capacity, self.layout.movable)
        target = (send(layout.start, slots.device)[..., None] + offset)[used]
        source = slots[used]
        self.fields = {}
        with ordinary_tensors():
            for name, field in old.items():
                fill = -1 if name == "positions" else 0
                self.fields[name] = field.new_full((layout.slots, *field.shape[1:]), fill)
                self.fields[name].index_copy_(0, target, field.index_select(0, source))
        self.layout = layout
        self._set_length(self.length[rows])

    def _move(self, capacity: torch.Tensor) -> None:
        """Share the same slots out otherwise, field by field."""
        start, device = self.layout.start, self.device
        self.layout = self.layout.moved(capacity)
        # Sent at once: how far the tokens of a head move, where they end, and its slots.
        heads = [start - self.layout.start, self.layout.start + self.length, capacity]
        table = torch.stack([each.flatten()[self.layout.order] for each in heads])
        shift, end, owned = send(table, device)
        slot, size = torch.arange(self.layout.slots, device=device), self.layout.slots
        used = slot < end.repeat_interleave(owned, output_size=size)
        source = slot + shift.repeat_interleave(owned, output_size=size)
        source = source.where(used, slot)
        for name, field in self.fields.items():
            moved = field.index_select(0, source)
            if name in self.statistics:
                moved.masked_fill_(~used, 0)
            field.copy_(moved)
        self.note_length(self.length)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder rows: new row `i` is a copy of row `rows[i]`."""
        if self.layout.is_uniform:
            index, batch = send(rows, self.device), self.length.shape[0]
            with ordinary_tensors():
                self.fields = {
                    name: field.unflatten(0, (batch, -1)).index_select(0, index).flatten(0, 1)
                    for name, field in self.fields.items()
                }
            self.layout = RaggedLayout(self.capacity[rows], self.layout.movable)
            self._set_length(self.length[rows])
        else:
            self.relayout(self.capacity[rows], rows)

    def snapshot(self, *, deep: bool) -> RaggedPool:
        """Return a pool that later appends to this one leave as it is.

        Parameters
        ----------
        deep : bool
            True shares no storage and survives compactions too; False copies the statistics only.
        """
        copied = object.__new__(RaggedPool)
        copied.layout, copied.statistics = self.layout, self.statistics
        copied._set_length(self.length)
        with ordinary_tensors():
            copied.fields = {
                name: field.clone() if deep or name in self.statistics else field
                for name, field in self.fields.items()
            }
        return copied

    def held(self) -> HeldPositions:
        """Return which positions are held; a view that the next change invalidates."""
        return HeldPositions(self.fields["positions"], self.layout, self.length)
