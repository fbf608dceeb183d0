"""One layer of a cache, as transformers sees it: lengths, guarded tensors, rows, taking back.

Tokens lie in a store. This layer keeps all of them; one with a policy evicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from hf_reasoncache.guards import GuardTensor, LogicalLength
from hf_reasoncache.precision import as_attended, without_autocast
from hf_reasoncache.shards import ALONE, Agreement, Shard
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.pool_store import PoolStore, distinct_bytes
from hf_reasoncache.storage.segment import Path


class CacheLayer(CacheLayerMixin):
    """One layer whose length, towards the model, is the number of tokens seen.

    A forward is two calls: `update`, from the model's attention module, announces the new keys and
    values; the attention function then takes them with `take_incoming`, and either lets the base
    implementation attend and calls `store_first`, or calls `attend`. Padding is known only there,
    hence tokens enter the store there; padding never does.

    Parameters
    ----------
    index : int
        Index of the layer in the model.
    store : PoolStore, optional
        Where the tokens lie; a pool of its own by default.

    Attributes
    ----------
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
    evictions, evicted : int
        Compactions so far, each row counted; tokens evicted so far, each row and head counted.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    evictions = evicted = 0

    def __init__(self, index: int, store: PoolStore | None = None) -> None:
        # Not the mixin's, which sets keys and values: here they are made when somebody reads them.
        self.is_initialized = False
        self.index = index
        self.record_past = False
        self.layers = 0
        self.shard: Shard = ALONE
        self.agreement: Agreement = "agree"
        self.store = PoolStore() if store is None else store
        self._clear()

    def _clear(self) -> None:
        """Forget all tokens and free their storage."""
        self.seen = 0
        self.shown: torch.Tensor | None = None
        self.differentiable = self.gives_weights = False
        self._incoming: tuple[torch.Tensor, torch.Tensor] | None = None
        self._in_prompt = True
        self.store.clear()

    @property
    def rows(self) -> int | None:
        """Batch rows stored; None before the first forward."""
        return self.store.rows

    @property
    def may_evict(self) -> bool:
        """Whether anything is evicted once the text is long enough."""
        return False

    # --------------------------------------------------------------------------------- one forward

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
        self._begin(steps)
        keys, values = as_attended(key_states, value_states)
        self._incoming = (keys, values)
        self.seen += steps
        return GuardTensor.wrap(keys, self), GuardTensor.wrap(values, self)

    def _begin(self, steps: int) -> None:
        """Do what is due before `steps` new tokens; nothing ever is where everything is kept."""

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

    def store_first(self, new: NewTokens) -> None:
        """Take in the tokens of the first forward, which the base implementation attended to."""
        self.store.store_first(new, self.seen, self.shard)

    def attend(self, new: NewTokens) -> torch.Tensor:
        """Store the new tokens, which the last `update` announced, and attend to all held ones.

        Returns
        -------
        Tensor[B, T, H_q, D_v]
        """
        self._make_room(new.steps)
        self.store.append(new, self.seen)
        out = self.store.attend(new, self.seen)
        self._in_prompt = self._in_prompt and new.steps > 1 and not self.record_past
        if self._in_prompt:
            self.store.extend_prompt(new, self.seen, self.shard)
        return out

    def _make_room(self, steps: int) -> None:
        self.store.make_room(steps)

    def take_back(self, steps: int) -> None:
        """Undo a forward of `steps` columns that was refused before or after they were stored."""
        if self._incoming is not None:
            self._incoming = None
            self.seen -= steps
        else:
            self.store.forget_order()
            self._crop(steps)

    # ------------------------------------------------------------------------------ captured steps

    @property
    def expects_prompt(self) -> bool:
        """Whether a single token would still be part of the prompt."""
        return False

    def prepare(self) -> None:
        """Do what must be done before one new token, so that the step itself does nothing else.

        Afterwards the step has static shapes, allocates nothing that stays, and never waits: it can
        be captured, and replayed if `static_parts` are the same objects.
        """
        self._begin(1)
        self._make_room(1)
        # Asked for here, so that it is not made within the step.
        _ = self.store.tokens.device_length

    def static_parts(self) -> Iterator[Any]:
        """Yield the objects that a captured step reads and writes where they are."""
        yield from self.store.static_parts()

    def advance(self) -> None:
        """Take note of one token per row that a replayed step has stored."""
        self.seen += 1
        self.store.advance()

    # ---------------------------------------------------------------------- what transformers asks

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

    def _crop(self, columns: int) -> None:
        """Take back the newest columns, which are at least one and not all."""
        self.seen -= columns
        self.store.crop(self.seen, columns)

    def hide(self, hidden: torch.Tensor) -> None:
        """Follow another attention mask; see `PoolStore.hide`."""
        self.store.hide(hidden)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder rows: new row `i` copies row `rows[i]` (LongTensor, CPU)."""
        self.store.select_rows(rows)
        self._select_shown(rows)

    def fork(self, rows: torch.Tensor) -> None:
        """Like `select_rows`, for rows that will go on for long; see `PoolStore.fork`."""
        self.store.fork(rows)
        self._select_shown(rows)

    def add_row(self, path: Path, first: int) -> None:
        """Add a row behind the last one; see `BranchStore.add_row`, which the store must be."""
        store: Any = self.store
        store.add_row(path, first)
        if self.shown is not None:
            self.shown = torch.cat([self.shown, torch.ones_like(self.shown[:1])])

    def _select_shown(self, rows: torch.Tensor) -> None:
        if self.shown is not None:
            self.shown = self.shown[rows.to(self.shown.device)]

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
            self.fork(torch.arange(self.rows, device="cpu").repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything, storage included."""
        self._clear()
        self.is_initialized = False
        self.record_past = False

    def offload(self) -> None:
        """Refuse: the pool must stay where its layer runs."""
        raise ValueError("offloading is not supported: the pool must stay on its layer's device.")

    # --------------------------------------------------------------------------------------- report

    def held(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: tokens held, on the CPU."""
        return self.store.held()

    def held_positions(self) -> list[list[list[int]]]:
        """Sorted columns that the last forward attended to, per row and KV head; padding is never
        listed.
        """
        return self.held_now()

    def held_now(self) -> list[list[list[int]]]:
        """Sorted columns that are held after all that the last forward has evicted."""
        return self.store.held_positions()

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
        if self.rows is None:
            return None
        if self.evicted:
            raise ValueError(
                f"layer {self.index}: expected to hold all {self.seen} columns, for {name} in one "
                f"tensor, got heads that hold {self.held().min()} to {self.held().max()} tokens, "
                "each its own; cache.held_positions(layer_idx) says which."
            )
        return self.store.dense(name, self.seen)

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """All keys, see `dense`; for reading."""
        return self.dense("keys")

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """All values, see `dense`; for reading."""
        return self.dense("values")

    def kv_tensors(self) -> Iterator[torch.Tensor]:
        """Yield all keys and values."""
        yield from self.store.kv_tensors()

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all tensors whose size grows with the tokens seen or held."""
        yield from self.store.tensors()
        if self.shown is not None:
            yield self.shown

    @property
    def nbytes(self) -> int:
        """Bytes of all storages behind `tensors`, each counted once."""
        return distinct_bytes(self.tensors())
