"""Where a layer keeps its tokens: a ragged pool, and what a mask hides of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from hf_reasoncache.shards import Shard
from hf_reasoncache.storage.aside import exchange, gathered
from hf_reasoncache.storage.dense import dense_tokens
from hf_reasoncache.storage.forms import AS_THEY_COME, Form
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.pool import RaggedPool
from hf_reasoncache.storage.stored_tokens import StoredTokens
from triton_ops.backend import uses_triton
from triton_ops.decode_attention import decode_attention, even_attention
from triton_ops.launch import send

FIRST_ROOM = 256
"""Slots allocated beyond the prompt when no budget says how long the text may become."""

GROWTH = 4
"""A full pool without a budget moves into one that is larger by one part in so many, and by
`FIRST_ROOM` slots at least."""

ATTENTION, SCORER_STATE = "cumulative_attention", "scorer_state"
"""Statistics of a token: the attention it has received, and what a scorer has noted about it."""

_STATISTICS = {ATTENTION: torch.float32, SCORER_STATE: torch.int32}
_BLOCK = 64
"""Queries of a prompt per pass while the attention that its tokens receive is summed up."""


def distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all storages behind some tensors, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _NoTokens:
    """Stands for the pool before the first forward: whoever uses it gets an error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError("expected stored tokens, got an empty layer of a cache.")

    def __reduce__(self) -> str:
        """Be the same object in every copy of a store."""
        return "_NO_TOKENS"


_NO_TOKENS = _NoTokens()


class PoolStore:
    """The tokens of one layer, every row and KV head in a stretch of one `RaggedPool`.

    It knows neither the model nor a policy: tokens come in with `append`, are read by `attend` and
    `read`, and go with `evict`. Padding never enters it.

    Parameters
    ----------
    form : Form
        What is held of keys and values; they themselves by default.

    Attributes
    ----------
    form : Form
        May be replaced as long as there are no tokens.
    shares : bool
        Whether rows share what they have in common.
    in_pool : bool
        Whether all that rows hold of their own lies in `tokens` as it came, which may be read and
        compacted there by others.
    statistics : mapping from str to dtype
        Numbers that are kept per token; see `keep_statistics`.
    tokens : RaggedPool
        There is none until the first forward is stored; using it earlier is a ValueError.
    first : LongTensor[B]
        Column of each row's first real token, on the CPU; -1 while a row has only seen padding.
    movable : bool
        Whether heads may get other shares of the same slots; see `RaggedPool`.
    clock : LongTensor[1] or None
        On the pool's device, set while a step is captured: the column of the one new token, read
        wherever the host's count would otherwise become part of the graph.
    aside : RaggedPool or None
        Tokens that the attention mask hides; replaced, never written to.
    """

    shares = False
    in_pool = True

    def __init__(self, form: Form = AS_THEY_COME) -> None:
        self.form = form
        self.statistics: Mapping[str, torch.dtype] = {}
        self._decay = 1.0
        self.movable = False
        self.clear()

    def clear(self) -> None:
        """Forget all tokens and free their storage."""
        self.tokens = cast(RaggedPool, _NO_TOKENS)
        self.first = torch.zeros(0, dtype=torch.long, device="cpu")
        self.clock: torch.Tensor | None = None
        self.aside: RaggedPool | None = None
        self._placed = False
        # Newest columns that every head is known to hold in its last slots, where a crop finds
        # them.
        self._tail = 0

    def keep_statistics(
        self, *, cumulative_attention: bool, decay: float, scorer_state: bool
    ) -> None:
        """Say what is kept about every token, before the first one comes.

        Parameters
        ----------
        cumulative_attention : bool
            Whether the attention that a token receives is summed up, over queries and query heads.
        decay : float
            Factor on these sums at every new query.
        scorer_state : bool
            Whether a scorer may keep a number per token.
        """
        wanted = {ATTENTION: cumulative_attention, SCORER_STATE: scorer_state}
        self.statistics = {name: kind for name, kind in _STATISTICS.items() if wanted[name]}
        self._decay = decay

    @property
    def pool(self) -> RaggedPool | None:
        """The pool; None until the first forward is stored."""
        return None if self.tokens is _NO_TOKENS else self.tokens

    @property
    def rows(self) -> int | None:
        """Batch rows stored; None before the first forward."""
        return None if self.pool is None else len(self.first)

    # ----------------------------------------------------------------------------------- new tokens

    def begin(self, new: NewTokens, end: int) -> None:
        """Note how many rows there are, and where they begin, from the first tokens that come."""
        self.first = torch.full((new.keys.shape[0],), -1, device="cpu")
        self._placed = False
        self._place_first(end - new.q_len, new.valid)

    def allocate(self, capacity: torch.Tensor, new: NewTokens) -> RaggedPool:
        """Make an empty pool with `capacity` slots, LongTensor[B, H_kv], in place of any other."""
        one_head = self.form.fields(new.keys[:1, :1, :1], new.values[:1, :1, :1])
        like = {name: field[0, 0] for name, field in one_head.items()}
        self.tokens = RaggedPool(capacity, like, self.statistics, movable=self.movable)
        self._tail = 0
        return self.tokens

    def store_first(self, new: NewTokens, end: int, shard: Shard) -> None:
        """Store the tokens of the first forward, with room for more.

        Parameters
        ----------
        new : NewTokens
        end : int
            Column behind the last of them.
        shard : Shard
            Which KV heads of the layer these are.
        """
        batch, heads, q_len, _ = new.keys.shape
        self.begin(new, end)
        self.allocate(torch.full((batch, heads), q_len + FIRST_ROOM, device="cpu"), new)
        self.append(new, end)

    def store_part(
        self,
        new: NewTokens,
        end: int,
        capacity: torch.Tensor,
        keep: torch.Tensor | None,
        **statistics: torch.Tensor,
    ) -> None:
        """Store some tokens of the first forward, after `begin`.

        Parameters
        ----------
        new : NewTokens
        end : int
        capacity : LongTensor[B, H_kv]
            Slots of each head.
        keep : BoolTensor[B, H_kv, T] or None
            What is stored; None stores everything.
        **statistics : Tensor[B, H_kv, T]
        """
        columns = torch.arange(end - new.q_len, end, device=new.keys.device)
        fields = self.form.fields(new.keys, new.values)
        self.allocate(capacity, new).append(fields, columns, keep, **statistics)
        self._tail = new.q_len if keep is None else 0

    def extend_prompt(self, new: NewTokens, end: int, shard: Shard) -> None:
        """Take note that the newest tokens in the pool are another chunk of the prompt."""

    def _place_first(self, begin: int, valid: torch.Tensor | None) -> None:
        """Note where rows begin that had no real token before column `begin`."""
        if valid is None:
            found = torch.full_like(self.first, begin)
        else:
            found = (begin + valid.int().argmax(-1)).where(valid.any(-1), -1).cpu()
        self.first = self.first.where(self.first >= 0, found)
        self._placed = bool((self.first >= 0).all())

    def make_room(self, q_len: int) -> None:
        """Make sure that every head has room for `q_len` more tokens, and for many after them."""
        pool = self.tokens
        if q_len > pool.least_free:
            slots = max(_grown(int(pool.capacity.max())), pool.longest + q_len)
            pool.relayout(torch.full_like(pool.capacity, slots))

    def append(self, new: NewTokens, end: int, ring: torch.Tensor | None = None) -> None:
        """Append tokens whose last one is column `end - 1`; there must be room.

        Parameters
        ----------
        new : NewTokens
        end : int
        ring : Tensor[B, H_q, places, D], optional
            Gets the query of a single token too; see `QueryWindow.ring`.
        """
        batch, heads, q_len, _ = new.keys.shape
        columns: torch.Tensor | int | None = self.clock
        if columns is None and q_len == 1:
            columns = end - 1
        elif columns is None:
            columns = torch.arange(end - q_len, end, device=new.keys.device)
        keep = None if new.valid is None else new.valid[:, None].expand(batch, heads, q_len)
        if not self._placed:
            self._place_first(end - q_len, new.valid)
        tokens = self.form.fields(new.keys, new.values)
        if ring is not None:
            self.tokens.append_single(tokens, columns, (ring, new.query))
        else:
            self.tokens.append(tokens, columns, keep)
        self._tail = self._tail + q_len if new.valid is None else 0

    # ------------------------------------------------------------------------------------ attention

    def attend(self, new: NewTokens, end: int) -> torch.Tensor:
        """Attend to all that is held with queries whose last one is at column `end - 1`.

        Statistics of attention change, nothing else.

        Returns
        -------
        Tensor[B, T, H_q, D_v]
        """
        pool, operands, query = self.tokens, self.operands, self.form.query(new.query)
        batch, query_heads, q_len, head_size = query.shape
        heads, kernels = pool.length.shape[1], uses_triton(query)
        if not kernels and self._is_even(new):
            even: dict[str, Any] = {**operands, "layout": pool.layout, "tokens": pool.longest}
            out = even_attention(query, **even, scaling=new.settings["scaling"])
            return out.to(new.query.dtype)
        asking = None
        if q_len > 1:
            asking = torch.arange(end - q_len, end, device=new.query.device)
            asking = asking.expand(batch, q_len)
            if new.valid is not None:
                asking = asking.masked_fill(~new.valid, -1)
        out = self._attention()(
            query=query.reshape(batch, heads, query_heads // heads, q_len, head_size),
            **operands,
            positions=pool.fields["positions"],
            layout=pool.layout,
            length=pool.length,
            device_length=pool.device_length if kernels else None,
            query_positions=asking,
            **new.settings,
            **self._summing(query),
        )
        return out.to(new.query.dtype)

    @property
    def operands(self) -> dict[str, torch.Tensor]:
        """What attention reads of the pool; see `Form.operands`."""
        return self.form.operands(self.tokens.fields)

    @property
    def uses_kernels(self) -> bool:
        """Whether the Triton kernels attend to the pool."""
        # Codes of fewer bits are no floating-point numbers, and always beside some.
        computed = (x for x in self.operands.values() if x.is_floating_point())
        return uses_triton(next(computed))

    def _summing(self, query: torch.Tensor) -> dict[str, torch.Tensor]:
        """What makes `decode_attention` add to the attention that tokens have received."""
        if ATTENTION not in self.statistics:
            return {}
        received, q_len = self.tokens.fields[ATTENTION], query.shape[2]
        if self._decay == 1.0:
            return {ATTENTION: received}
        received.mul_(self._decay**q_len)
        age = torch.arange(q_len - 1, -1, -1, device=query.device)
        return {ATTENTION: received, "attention_weight": self._decay**age}

    def sum_attention(self, new: NewTokens, end: int) -> None:
        """Change the statistics as `attend` would, for tokens whose output is known already."""
        if ATTENTION not in self.statistics:
            return
        for start in range(0, new.q_len, _BLOCK):
            block = new.columns(start, start + _BLOCK)
            self.attend(block, end - new.q_len + start + block.q_len)

    def _is_even(self, new: NewTokens) -> bool:
        """Whether one token asks heads that hold equally many."""
        pool, settings = self.tokens, new.settings
        return (
            pool.is_even
            and pool.longest > 0
            and new.q_len == 1
            and not self.shares
            and ATTENTION not in self.statistics
            and settings["softcap"] is None
            and settings["s_aux"] is None
        )

    def _attention(self) -> Callable[..., torch.Tensor]:
        """Return what attends to the pool; called with the arguments of `decode_attention`."""
        return decode_attention

    # ------------------------------------------------------------------------------------ evictions

    @property
    def length(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: tokens in the pool, on the CPU."""
        return self.tokens.length

    @property
    def capacity(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: slots that the pool has for each head, on the CPU."""
        return self.tokens.capacity

    @property
    def least_free(self) -> int:
        """Fewest free slots of a head in the pool."""
        return self.tokens.least_free

    def before(self, rows: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Count tokens in the pool.

        Parameters
        ----------
        rows : LongTensor[R]
            On the CPU.
        column : LongTensor[R]

        Returns
        -------
        LongTensor[R, H_kv]
            Tokens before that column of each row, on the CPU.
        """
        slots, offset = self.tokens.slots(rows)
        at = self.tokens.take("positions", slots)
        return ((at < send(column, at.device)[:, None, None]) & (offset >= 0)).sum(-1).cpu()

    def read(
        self, rows: torch.Tensor, columns: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> StoredTokens:
        """Find what some rows hold in the pool; changes nothing.

        Parameters
        ----------
        rows : LongTensor[R]
            On the CPU.
        columns : two of LongTensor[R], optional
            First column of each row to read, and first one after it not to; all by default.
        """
        pool = self.tokens
        slots, offset = pool.slots(rows)
        filler, last = offset < 0, torch.iinfo(torch.long).max
        at = pool.take("positions", slots).long().masked_fill_(filler, -1)
        if columns is None:
            order = _lowest_first(at.masked_fill(filler, last))
        else:
            low, high = columns
            inside = at >= send(low, at.device)[:, None, None]
            inside &= at < send(high, at.device)[:, None, None]
            offset, at = offset.masked_fill(~inside, -1), at.masked_fill(~inside, -1)
            # Selection, not a sort of everything: a span is short and the past may be long.
            far = at.masked_fill(~inside, last)
            order = far.topk(int(inside.sum(-1).max()), largest=False).indices
        place, offset = slots.gather(-1, order), offset.gather(-1, order)

        take, whole = partial(self.take, place), columns is None
        count = pool.length[rows] if whole else None
        return StoredTokens(rows, at.gather(-1, order), place, take, offset, whole, count)

    def take(self, slots: torch.Tensor, name: str) -> torch.Tensor:
        """Copy keys, values or a statistic of some slots, as a scorer is to see them.

        Parameters
        ----------
        slots : LongTensor[...]
        name : str

        Returns
        -------
        Tensor[*slots.shape, ...]
        """
        take = partial(self.tokens.take, slots=slots)
        return take(name) if name in self.statistics else self.form.read(name, take)

    def evict(
        self, tokens: StoredTokens, keep: torch.Tensor, kept: torch.Tensor | None = None
    ) -> None:
        """Let tokens go that `read` has found and nothing has moved since.

        Parameters
        ----------
        tokens : StoredTokens
        keep : BoolTensor[R, H_kv, N]
            What stays of them; everything else that the rows hold stays anyway.
        kept : LongTensor[R, H_kv], optional
            How many that are, on the CPU, if it is known.
        """
        pool, slots, offset = self.tokens, tokens.place, tokens.offset
        if offset is None:
            raise ValueError("evict: expected tokens of the pool, got some that are not stored.")
        if not tokens.whole:
            gone = (tokens.valid & ~keep).nonzero(as_tuple=True)
            place = offset[gone]
            slots, offset = pool.slots(tokens.rows)
            keep = offset >= 0
            keep[gone[0], gone[1], place] = False
            kept = None
        pool.compact(tokens.rows, slots, offset, keep, kept)
        self._tail = 0

    def write_scorer_state(self, tokens: StoredTokens, scorer_state: torch.Tensor) -> None:
        """Store what a scorer has noted about tokens, IntTensor[R, H_kv, N]."""
        self.tokens.fields[SCORER_STATE].index_copy_(0, *tokens.only_real(scorer_state))

    def clear_scorer_state(self) -> None:
        """Forget what a scorer has noted: it may be about positions that other tokens will take."""
        if SCORER_STATE in self.statistics:
            self.tokens.fields[SCORER_STATE].zero_()

    def relayout(self, capacity: torch.Tensor) -> None:
        """Move the pool into a storage with `capacity` slots, LongTensor[B, H_kv]."""
        self.tokens.relayout(capacity)

    # ------------------------------------------------------------------------------- captured steps

    def static_parts(self) -> Iterator[Any]:
        """Yield the objects that a captured step reads and writes where they are."""
        pool = self.tokens
        # Where heads start stands for the layout and all that was made of it.
        start = pool.layout.start_on(pool.device_length.device)
        yield from (start, pool.device_length, *pool.fields.values())

    def advance(self) -> None:
        """Take note of one token per row that a replayed step has stored."""
        self._tail += 1
        self.tokens.count_appended(1)

    # ------------------------------------------------------------------------- masks, rows, undoing

    def hide(self, hidden: torch.Tensor) -> None:
        """Attend from now on to no column that is hidden, and again to all others that are held.

        Parameters
        ----------
        hidden : BoolTensor[B, T]
            True for columns that the attention mask hides; nothing for those after the last.
        """
        pool = self.tokens
        before = pool.length
        self.aside = exchange(pool, self.aside, hidden)
        if pool.length is not before:
            self.forget_order()

    @property
    def hides(self) -> bool:
        """Whether the mask hides tokens that are held."""
        return self.aside is not None

    def evict_hidden(self, rows: torch.Tensor) -> int:
        """Let what the mask hides in some rows go, LongTensor[R] on the CPU.

        Returns
        -------
        int
            Tokens evicted, each row and head counted.
        """
        if self.aside is None:
            return 0
        others = torch.ones(len(self.aside.length), dtype=torch.bool, device="cpu")
        others = others.index_fill(0, rows, False)[:, None, None]
        count = int(self.aside.length[rows].sum())
        self.aside = gathered([self.aside], lambda at: others.to(at.device).expand_as(at))
        return count

    def forget_order(self) -> None:
        """Take note that the newest tokens may lie anywhere: somebody has compacted the pool."""
        self._tail = 0

    def crop(self, end: int, columns: int) -> None:
        """Take back the newest `columns` columns, so that `end` are left."""
        pool = self.tokens
        if self.aside is not None:
            self.aside = gathered([self.aside], lambda at: at < end)
        if columns <= self._tail:
            pool.drop_newest(columns)
            self._tail -= columns
        else:
            rows = torch.arange(pool.length.shape[0], device="cpu")
            slots, offset = pool.slots(rows)
            keep = (pool.fields["positions"][slots] < end) & (offset >= 0)
            pool.compact(rows, slots, offset, keep)
            self._tail = 0

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder rows: new row `i` copies row `rows[i]` (LongTensor, CPU)."""
        if self.pool is not None:
            self.tokens.select_rows(rows)
            self.first = self.first[rows]
        if self.aside is not None:
            self.aside = self.aside.snapshot(deep=False)
            self.aside.select_rows(rows)

    def fork(self, rows: torch.Tensor) -> None:
        """Like `select_rows`, for rows that will go on for long: what copies have in common is
        stored once, if it can be.
        """
        self.select_rows(rows)

    def snapshot(self, *, deep: bool) -> PoolStore:
        """Copy, so that later appends leave the copy as it is; see `RaggedPool.snapshot`."""
        copied = copy.copy(self)
        copied.tokens = self.tokens.snapshot(deep=deep)
        return copied

    # --------------------------------------------------------------------------------------- report

    @property
    def elsewhere(self) -> torch.Tensor:
        """LongTensor[B]: tokens that every head of a row holds outside of the pool."""
        return torch.zeros_like(self.first)

    def held(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: tokens held, on the CPU."""
        return torch.zeros(0, 0, device="cpu") if self.pool is None else self.tokens.length

    def held_positions(self) -> list[list[list[int]]]:
        """Sorted columns that are held, per row and KV head; padding is never listed."""
        return [] if self.pool is None else self.with_shared(self.tokens.held().lists())

    def with_shared(self, own: list[list[list[int]]]) -> list[list[list[int]]]:
        """Add the columns that rows hold outside of the pool to those of each head in it."""
        return own

    def dense(self, name: str, columns: int) -> torch.Tensor:
        """Copy all keys or values that are held to `[B, H_kv, columns, D]`; zeros elsewhere."""
        pools = [self.tokens] if self.aside is None else [self.tokens, self.aside]
        return dense_tokens(pools, partial(self.form.read, name), columns)

    def kv_tensors(self) -> Iterator[torch.Tensor]:
        """Yield all that is held of keys and values."""
        for pool in (self.pool, self.aside):
            if pool is not None:
                yield from pool.held_fields.values()

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all tensors whose size grows with the tokens held."""
        for pool in (self.pool, self.aside):
            if pool is not None:
                yield from pool.fields.values()

    # -------------------------------------------------------------------------------- what it takes

    def slot_bytes(self, size: int, dtype: torch.dtype) -> int:
        """Bytes of one slot for keys of `size` numbers."""
        kept = sum(kind.itemsize for kind in self.statistics.values())
        return self.form.token_bytes(size, dtype) + torch.int32.itemsize + kept

    def slots_without_budget(self, prompt: int, generated: int) -> int:
        """Slots per head where every token is kept, after single tokens behind a prompt."""
        slots = prompt + FIRST_ROOM
        while slots < prompt + generated:
            slots = _grown(slots)
        return slots


def _grown(slots: int) -> int:
    """Slots of each head once a full pool has moved."""
    return slots + max(FIRST_ROOM, slots // GROWTH)


def _lowest_first(columns: torch.Tensor) -> torch.Tensor:
    """Return the order that sorts each row, LongTensor[..., N]; equal numbers in any order."""
    if columns.device.type != "cpu":
        return columns.argsort(dim=-1)
    # Faster than torch's on a CPU.
    return torch.from_numpy(np.argsort(columns.numpy(), axis=-1))
