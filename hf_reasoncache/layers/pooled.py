"""A cache layer on a ragged pool that keeps every token: fast, exact, and the base of the evicting layers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from hf_reasoncache.layers.contract import GuardTensor, LogicalLength
from hf_reasoncache.layers.pool import RaggedPool
from triton_ops.decode_attention import decode_attention

FIRST_ROOM = 256
"""Slots allocated beyond the prompt when no budget says how long the text may become."""


class PooledLayer(CacheLayerMixin):
    """One layer whose length, towards the model, is the number of tokens seen.

    A forward is two calls: `update` (from the model's attention module) announces the new keys and values,
    then the attention function either lets the base implementation attend and calls `store_first`, or calls
    `attend`. Padding is known only in the second call, hence tokens enter the pool there; padding never does.

    Attributes
    ----------
    seen : int
        Columns of the padded sequence seen so far.
    pool : RaggedPool or None
        None until the first forward is stored.
    first : LongTensor[B]
        Column of each row's first real token, on the CPU.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    statistics: tuple[str, ...] = ()

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.recording = False
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self.pool: RaggedPool | None = None
        self.first = torch.zeros(0, dtype=torch.long)
        self._incoming: tuple[torch.Tensor, torch.Tensor] | None = None
        # Newest columns that every head is known to hold in its last slots, so that they can be cropped there.
        self._tail = 0

    # --------------------------------------------------------------------------------------- one forward

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announce the keys and values of new tokens.

        Parameters
        ----------
        key_states, value_states : Tensor[B, H_kv, T, D], Tensor[B, H_kv, T, D_v]

        Returns
        -------
        tuple of GuardTensor
            For the `reasoncache` attention function only.
        """
        if self._incoming is not None:
            raise ValueError(
                f"layer {self.index}: expected the attention of the last forward to run before the next "
                "update, got two updates in a row; a cache serves one generation at a time (reset() makes it "
                "new after an interrupted one)."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, steps = key_states.shape[0], key_states.shape[-2]
        if self.pool is not None and batch != self.pool.length.shape[0]:
            raise ValueError(
                f"layer {self.index}: expected a batch of {self.pool.length.shape[0]} rows as before, got "
                f"{batch}; reset() the cache or use a new one for another batch."
            )
        self._begin(steps)
        self._incoming = (key_states, value_states)
        self.seen += steps
        return GuardTensor.wrap(key_states, self), GuardTensor.wrap(value_states, self)

    def take_incoming(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand over the plain keys and values that the last `update` announced."""
        if self._incoming is None:
            raise ValueError(
                f"layer {self.index}: expected one attention call per update, got a second one; models that "
                "reuse the keys and values of another layer are not supported."
            )
        incoming, self._incoming = self._incoming, None
        return incoming

    def _begin(self, steps: int) -> None:
        """Do what is due before `steps` new tokens; nothing is ever due in a layer that keeps everything."""

    def store_first(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
        **settings: Any,
    ) -> None:
        """Take in the tokens of the first forward, whose attention the base implementation has computed.

        Parameters
        ----------
        query : Tensor[B, H_q, T, D]
        keys, values : Tensor[B, H_kv, T, D], Tensor[B, H_kv, T, D_v]
        valid : BoolTensor[B, T] or None
            False for padding; None when nothing is padded.
        **settings
            `scaling`, `softcap`, `s_aux` of the attention.
        """
        batch, heads, steps, _ = keys.shape
        self._note_first(batch, steps, valid)
        self.pool = RaggedPool(
            torch.full((batch, heads), steps + FIRST_ROOM), keys, values, self.statistics
        )
        self._append(keys, values, valid)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
        *,
        scaling: float,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new tokens and attend to all held ones.

        Parameters
        ----------
        query : Tensor[B, H_q, T, D]
        keys, values : Tensor[B, H_kv, T, D], Tensor[B, H_kv, T, D_v]
            What the last `update` announced.
        valid : BoolTensor[B, T] or None
            False for padding; None when nothing is padded.
        scaling, softcap, s_aux
            See `triton_ops.decode_attention`.

        Returns
        -------
        Tensor[B, T, H_q, D_v]
        """
        self._make_room(query.shape[2])
        self._append(keys, values, valid)
        return self._attend(query, valid, scaling=scaling, softcap=softcap, s_aux=s_aux)

    # ------------------------------------------------------------------------------------------- storage

    def _note_first(self, batch: int, steps: int, valid: torch.Tensor | None) -> None:
        if valid is None:
            self.first = torch.zeros(batch, dtype=torch.long)
        else:
            self.first = valid.int().argmax(-1).cpu()

    def _make_room(self, steps: int) -> None:
        pool = self._require_pool()
        needed = int(pool.length.max()) + steps
        if needed > int(pool.capacity.min()):
            doubled = max(2 * int(pool.capacity.max()), needed)
            pool.relayout(torch.full_like(pool.capacity, doubled))

    def _append(
        self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None, end: int | None = None
    ) -> None:
        """Append tokens whose last one is column `end - 1` (by default the newest column)."""
        batch, heads, steps, _ = keys.shape
        end = self.seen if end is None else end
        columns = torch.arange(end - steps, end, device=keys.device)
        keep = None if valid is None else valid[:, None].expand(batch, heads, steps)
        self._require_pool().append(keys, values, columns, keep)
        self._tail = self._tail + steps if valid is None else 0

    def _attend(
        self,
        query: torch.Tensor,
        valid: torch.Tensor | None,
        *,
        end: int | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """Attend to the pool with queries whose last one is at column `end - 1`."""
        pool = self._require_pool()
        batch, query_heads, steps, head_size = query.shape
        heads = pool.length.shape[1]
        end = self.seen if end is None else end
        asking = None
        if steps > 1:
            asking = torch.arange(end - steps, end, device=query.device).expand(batch, steps)
            if valid is not None:
                asking = asking.masked_fill(~valid, -1)
        return decode_attention(
            query.reshape(batch, heads, query_heads // heads, steps, head_size),
            pool.fields["keys"],
            pool.fields["values"],
            pool.fields["positions"],
            pool.layout,
            pool.length,
            query_positions=asking,
            **settings,
        )

    def _require_pool(self) -> RaggedPool:
        if self.pool is None:
            raise ValueError(f"layer {self.index}: expected stored tokens, got an empty cache layer.")
        return self.pool

    # ------------------------------------------------------------------- transformers' layer contract

    def get_seq_length(self) -> int:
        """Return the logical length: tokens seen, padding included, whatever is still held."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no limit to the logical length."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return logical key length and offset for the mask of `query_length` new tokens."""
        return LogicalLength(self.seen + query_length), 0

    def activate_past_recording(self) -> None:
        """Expect a `crop` after every forward (assisted decoding)."""
        self.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` columns."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: expected 0 or the negative number of tokens to remove, got {tokens_to_remove}; use "
                "crop(-n)."
            )
        columns = min(-tokens_to_remove, self.seen)
        if columns and self.pool is not None:
            self._crop(columns)
        if columns and self.seen == 0:
            self._clear()

    def _crop(self, columns: int) -> None:
        pool = self._require_pool()
        self.seen -= columns
        if columns <= self._tail:
            pool.drop_newest(columns)
            self._tail -= columns
        else:
            rows = torch.arange(pool.length.shape[0])
            slots, offset = pool.slots(rows)
            pool.compact(rows, slots, offset, (pool.fields["positions"][slots] < self.seen) & (offset >= 0))
            self._tail = 0

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder batch rows: new row `i` is a copy of row `rows[i]` (LongTensor, CPU)."""
        if self.pool is not None:
            self.pool.select_rows(rows)
            self.first = self.first[rows]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search."""
        self.select_rows(beam_idx.cpu())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows of `indices` (positions or a mask)."""
        if self.pool is not None:
            self.select_rows(torch.arange(self.first.shape[0])[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies beside each other."""
        if self.pool is not None:
            self.select_rows(torch.arange(self.first.shape[0]).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything, storage included."""
        self._clear()
        self.is_initialized = False
        self.recording = False

    def offload(self) -> None:
        """Refuse: the pool must stay where its layer runs."""
        raise ValueError("offloading is not supported: the pool must stay on its layer's device.")

    # -------------------------------------------------------------------------------------------- report

    @property
    def nbytes(self) -> int:
        """Bytes of all storages this layer owns."""
        return 0 if self.pool is None else self.pool.nbytes

    def held_positions(self) -> list[list[list[int]]]:
        """Sorted columns that the last forward attended to, per row and KV head; padding is never listed."""
        return [] if self.pool is None else self.pool.held().lists()
