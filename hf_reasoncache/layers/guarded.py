"""The side of a layer that transformers sees: logical lengths, guarded tensors, rows, rollback."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from hf_reasoncache.layers.chunk import Chunk
from hf_reasoncache.layers.contract import GuardTensor, LogicalLength
from hf_reasoncache.layers.precision import as_attended, without_autocast
from hf_reasoncache.shards import ALONE, Agreement, Shard


class GuardedLayer(CacheLayerMixin):
    """One layer whose length, towards the model, is the number of tokens seen.

    A forward is two calls: `update`, from the model's attention module, announces the new keys and
    values; the attention function then takes them with `take_incoming`.

    Attributes
    ----------
    index : int
        Index of the layer in the model.
    seen : int
        Columns of the padded sequence seen so far.
    record_past : bool
        Whether every forward may be cropped (assisted decoding); transformers' name, which it sets
        to False when that is over.
    shown : BoolTensor[B, T] or None
        The attention mask of the last forward; None where all columns were shown. Kept by the first
        layer of a cache only.
    shard : Shard
        Which KV heads of the layer are here; set with the first forward.
    layers : int
        Layers of the model that the cache was made for; 0 is not known.
    agreement : {"agree", "local"}
        Whether processes with other heads of the layer decide together with this one.
    differentiable : bool
        Whether the model would give the tokens that are stored a gradient.
    gives_weights : bool
        Whether the model's config asks for attention weights.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, index: int) -> None:
        # Not the mixin's, which sets keys and values: here they are made when somebody reads them.
        self.is_initialized = False
        self.index = index
        self.record_past = False
        self.layers = 0
        self.shard: Shard = ALONE
        self.agreement: Agreement = "agree"
        self._clear()

    def _clear(self) -> None:
        """Forget all tokens and free their storage."""
        self.seen = 0
        self.shown: torch.Tensor | None = None
        self.differentiable = self.gives_weights = False
        self._incoming: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    @abstractmethod
    def may_evict(self) -> bool:
        """Whether anything is evicted once the text is long enough."""

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """Batch rows stored; None before the first forward."""

    @abstractmethod
    def held(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: tokens held, on the CPU."""

    @abstractmethod
    def _begin(self, steps: int) -> None:
        """Do what is due before `steps` new tokens."""

    @abstractmethod
    def _crop(self, columns: int) -> None:
        """Take back the newest columns, which are at least one and not more than were seen."""

    @abstractmethod
    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder rows: new row `i` copies row `rows[i]` (LongTensor, CPU)."""

    @abstractmethod
    def hide(self, hidden: torch.Tensor) -> None:
        """Attend from now on to no column that is hidden, and again to all others that are held.

        Parameters
        ----------
        hidden : BoolTensor[B, T]
            True for columns that the attention mask hides; nothing for those after the last.
        """

    def dense(self, name: str) -> torch.Tensor | None:
        """Copy all keys or values into one tensor, as stock layers hold them.

        Parameters
        ----------
        name : {"keys", "values"}

        Returns
        -------
        Tensor[B, H_kv, seen, D] or None
            Zeros for padding; None before the first forward.

        Raises
        ------
        ValueError
            If tokens have been evicted.
        """

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """All keys, see `dense`; for reading."""
        return self.dense("keys")

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """All values, see `dense`; for reading."""
        return self.dense("values")

    @abstractmethod
    def store_first(self, chunk: Chunk) -> None:
        """Take in the tokens of the first forward, which the base implementation attended to."""

    @abstractmethod
    def attend(self, chunk: Chunk) -> torch.Tensor:
        """Store the new tokens, which the last `update` announced, and attend to all held ones.

        Returns
        -------
        Tensor[B, T, H_q, D_v]
        """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note device, and the type in which tokens are held."""
        (keys,) = as_attended(key_states)
        self.dtype, self.device = keys.dtype, keys.device
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

        Raises
        ------
        ValueError
            If the attention of the last forward never ran.
        """
        self.expect_idle()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        steps = key_states.shape[-2]
        with without_autocast(key_states.device):
            self._begin(steps)
        keys, values = as_attended(key_states, value_states)
        self._incoming = (keys, values)
        self.seen += steps
        return GuardTensor.wrap(keys, self), GuardTensor.wrap(values, self)

    def expect_idle(self) -> None:
        """Raise ValueError if an `update` was announced whose attention never ran."""
        if self._incoming is not None:
            raise ValueError(
                f"layer {self.index}: expected the attention of the last forward to run before the "
                "next update, got two updates in a row; a cache serves one generation at a time "
                "(reset() makes it new after an interrupted one) and cannot be filled by hand "
                "(prefix tuning: use DynamicCache)."
            )

    def take_incoming(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand over the plain keys and values that the last `update` announced."""
        if self._incoming is None:
            raise ValueError(
                f"layer {self.index}: expected one attention call per update, got a second one; "
                "models that reuse the keys and values of another layer are not supported."
            )
        incoming, self._incoming = self._incoming, None
        return incoming

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
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` columns."""
        if tokens_to_remove > 0:
            raise ValueError(
                "crop: expected 0 or the negative number of tokens to remove, got "
                f"{tokens_to_remove}; use crop(-n)."
            )
        # transformers 5.15 passes a tensor.
        columns = min(-int(tokens_to_remove), self.seen)
        if columns == self.seen:
            self._clear()
        elif columns:
            with without_autocast(self.device):
                self._crop(columns)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search."""
        self.select_rows(beam_idx.cpu())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows of `indices` (positions or a mask)."""
        if self.rows is not None:
            self.select_rows(torch.arange(self.rows, device="cpu")[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies beside each other."""
        if self.rows is not None:
            self.select_rows(torch.arange(self.rows, device="cpu").repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything, storage included."""
        self._clear()
        self.is_initialized = False
        self.record_past = False

    def offload(self) -> None:
        """Refuse: the pool must stay where its layer runs."""
        raise ValueError("offloading is not supported: the pool must stay on its layer's device.")
