"""One layer of a cache, as transformers sees it: a store, a policy that evicts, observers.

A forward is two calls. `update`, from the model's attention module, evicts what is due and
announces the new keys and values; the attention function then takes them with `take_incoming`, and
either lets the base implementation attend and calls `store_first`, or calls `attend`. Padding is
known only there, hence tokens enter the store there; padding never does.

Evictions run at the start of `update`, never between an attention and its logits. Until then a
rejected draft can be cropped without a trace. Two forwards cannot wait, because the memory they
need is the one to be saved: a long prompt, and several tokens at once later. They are cut right
after their attention, and only then: what they ask for decides.

Rows are independent: a row in a padded batch evicts at the same tokens as that row alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from hf_reasoncache.guards import GuardTensor, LogicalLength
from hf_reasoncache.observers import Observer
from hf_reasoncache.policies.base import EvictionSpan, Policy, PromptRows, RowState
from hf_reasoncache.precision import without_autocast
from hf_reasoncache.risk import DamageScale, RiskLog
from hf_reasoncache.scorers.base import HeldTokens
from hf_reasoncache.shards import ALONE, Shard, TPMode
from hf_reasoncache.storage.held_positions import AllPositions, HeldPositions
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.pool_store import PoolStore, distinct_bytes
from hf_reasoncache.storage.query_window import QueryWindow
from hf_reasoncache.storage.segment import Path
from hf_reasoncache.storage.stored_tokens import IncomingCounts, StoredTokens, incoming_tokens
from triton_ops.launch import send


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A layer before a forward that may be taken back; see the attributes of `CacheLayer`."""

    store: PoolStore
    state: RowState | None
    observers: tuple[Observer, ...]
    queries: QueryWindow
    risk: RiskLog
    evictions: int
    evicted: int


@dataclass(frozen=True, eq=False)
class Draft:
    """A forward that may be taken back in part (assisted decoding).

    Undoing goes back to the layer before it and stores the accepted columns again, so that whatever
    the rejected ones caused, evictions included, leaves no trace.

    Attributes
    ----------
    new : NewTokens
    before : Snapshot
    token_by_token : bool
        Whether an eviction fell inside the draft, so that its tokens were stored one by one.
    """

    new: NewTokens
    before: Snapshot
    token_by_token: bool

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield what is kept for undoing."""
        yield from (self.new.query, self.new.keys, self.new.values)
        yield from self.before.store.tensors()
        yield from self.before.queries.tensors()


class CacheLayer(CacheLayerMixin):
    """One layer whose length, towards the model, is the number of tokens seen.

    Parameters
    ----------
    index : int
        Index of the layer in the model.
    policy : Policy, optional
        Says what is evicted; by default nothing is.
    store : PoolStore, optional
        Where the tokens lie; a pool of its own by default.
    observers : sequence of Observer
        See every forward and change nothing.

    Attributes
    ----------
    seen : int
        Columns of the padded sequence seen so far.
    state : RowState or None
        What every row may hold; None until the prompt is complete, and without a policy.
    queries : QueryWindow
        What later evictions will ask with.
    incoming : two of Tensor, or None
        Keys and values that `update` has announced and the attention has not taken yet.
    risk : RiskLog
        What the evictions cost, if the policy has it measured.
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
    rank : int
        Numbers of a latent, where the model caches latents and expands them to keys and values
        afterwards; 0 where it does not. See `hold_latents`.
    projection : Any
        What the attention function needs to know of that expansion, from the first forward on.
    tp_mode : {"agree", "local"}
        Whether processes with other heads of the layer decide together with this one.
    differentiable : bool
        Whether the model would give the tokens that are stored a gradient.
    gives_weights : bool
        Whether the model's config asks for attention weights.
    settings : dict
        `scaling`, `softcap`, `s_aux` of the last attention.
    evictions, evicted : int
        Compactions so far, each row counted; tokens evicted so far, each row and head counted.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        index: int,
        policy: Policy | None = None,
        store: PoolStore | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        # Not the mixin's, which sets keys and values: here they are made when somebody reads them.
        self.index = index
        self.record_past = False
        self.layers = self.rank = 0
        self.shard: Shard = ALONE
        self.tp_mode: TPMode = "agree"
        self.policy = policy
        self.store = PoolStore() if store is None else store
        self.observers = tuple(observers)
        if policy is not None:
            scorer = policy.scorer
            self.store.keep_statistics(
                cumulative_attention=scorer.needs_cumulative_attention,
                decay=scorer.attention_decay,
                scorer_state=scorer.keeps_state,
            )
            self.store.movable = policy.keeps_slots
        self._clear()

    def _clear(self) -> None:
        """Forget all tokens and free their storage."""
        self.is_initialized = False
        self.seen = self.evictions = self.evicted = 0
        self.shown: torch.Tensor | None = None
        self.differentiable = self.gives_weights = False
        self.store.clear()
        self.state: RowState | None = None
        self.queries = QueryWindow(self.query_columns)
        self.risk = RiskLog()
        for observer in self.observers:
            observer.reset()
        self.incoming: tuple[torch.Tensor, torch.Tensor] | None = None
        self.settings: dict[str, Any] = {}
        self.projection: Any = None
        self._prompt_open = True  # whether more tokens at once would belong to the prompt
        self._by_token = False  # whether the first forward had a single token
        self._calm = False  # whether nobody will ask for the queries of this forward
        self._attended: HeldPositions | AllPositions | None = None
        self._draft: Draft | None = None

    @property
    def rows(self) -> int | None:
        """Batch rows stored; None before the first forward."""
        return self.store.rows

    @property
    def may_evict(self) -> bool:
        """Whether anything is evicted once the text is long enough."""
        return self.policy is not None and self.policy.may_evict

    def hold_latents(self, rank: int) -> None:
        """Expect latents of `rank` numbers, and hold these instead of keys and values."""
        self.rank, self.store.form = rank, self.store.form.of_latents(rank)

    def first_queries(self, q_len: int) -> int:
        """Newest queries of a first forward of `q_len` columns that are ever asked for."""
        policy = self.policy
        if self.observers or self.record_past:
            return q_len
        if policy is None:
            return 0
        if policy.scorer.needs_cumulative_attention:
            return q_len
        asked = policy.open_columns(self.state, self.seen)
        return min(q_len, max(self.query_columns, asked))

    @property
    def query_columns(self) -> int:
        """Newest columns whose queries an eviction needs."""
        if self.policy is None:
            return 0
        risk = self.policy.risk
        return max(self.policy.query_columns, 0 if risk is None else risk.queries)

    # --------------------------------------------------------------------------------- one forward

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Evict what is due, and announce the keys and values of new tokens.

        Parameters
        ----------
        key_states, value_states : Tensor[B, H_kv, T, D], Tensor[B, H_kv, T, D_v]
            Or latents and rotary keys, Tensor[B, 1, T, rank] and Tensor[B, 1, T, D_rope].

        Returns
        -------
        tuple of GuardTensor
            For the `reasoncache` attention function only. Latents are returned as they are, as the
            model is to expand them.

        Raises
        ------
        ValueError
            If the attention of the last forward never ran, or latents are none.
        """
        self.expect_idle()
        q_len = key_states.shape[-2]
        if self.rank and tuple(key_states.shape[1::2]) != (1, self.rank):
            raise ValueError(
                f"layer {self.index}: expected latents [batch, 1, tokens, {self.rank}], as "
                "transformers' own models cache them, got keys or values of shape "
                f"{list(key_states.shape)}; use the model's code in transformers, without "
                "trust_remote_code."
            )
        if self.policy is not None:
            self._begin(q_len)
        self.incoming = (key_states, value_states)
        self.seen += q_len
        if self.rank:
            return key_states, value_states
        return GuardTensor.wrap(key_states, value_states, self)

    def _begin(self, q_len: int) -> None:
        """Do what is due before `q_len` new tokens."""
        self._attended = self._draft = None
        if not self.is_initialized:
            self._by_token = q_len == 1
            return
        room = 0
        if self.state is not None and not self._prompt_open:
            room = self.state.room(self.store, self.seen)
        # What an eviction will ask about is still to come, or will come at once and be kept whole.
        recorded = self.record_past or self.store.clock is not None
        self._calm = q_len == 1 and room > self.queries.size and not recorded
        if q_len > room:
            with without_autocast(self.device):
                self._evict_due(q_len)

    def _evict_due(self, q_len: int) -> None:
        """Fix what rows may hold if it is not yet, and evict what is due before `q_len` tokens."""
        grows = self._grows_prompt(self.seen, q_len)
        complete = self._prompt_open and not grows
        state = self.state
        if state is None:
            state, complete = self._allocate(), True
            self._fit(self.seen)
        if complete:
            state.check_prompt()
        if self.record_past or (q_len == 1 and not grows):
            self._evict(state, state.due(self.store, self.seen, 1), self.seen)

    def expect_idle(self) -> None:
        """Raise ValueError if an `update` was announced whose attention never ran."""
        if self.incoming is not None:
            raise ValueError(
                f"layer {self.index}: expected the attention of the last forward to run before the "
                "next update, got two updates in a row; a cache serves one generation at a time "
                "(reset() makes it new after an interrupted one) and cannot be filled by hand "
                "(prefix tuning: use DynamicCache)."
            )

    def take_incoming(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand over the plain keys and values that the last `update` announced."""
        if self.incoming is None:
            raise ValueError(
                f"layer {self.index}: expected one attention call per update, got a second one; "
                "models that reuse the keys and values of another layer are not supported."
            )
        incoming, self.incoming = self.incoming, None
        return incoming

    def attend(self, new: NewTokens) -> torch.Tensor:
        """Store the new tokens, which the last `update` announced, and attend to all held ones.

        Returns
        -------
        Tensor[B, T, H_q, D_v]
        """
        if self.record_past and self.policy is not None:
            return self._attend_draft(new)
        q_len = new.q_len
        if self._prompt_open:
            self._prompt_open = self._grows_prompt(self.seen - q_len, q_len)
        # 1. Store the tokens, and attend to all that is held.
        self._make_room(q_len)
        out = self._attend_to(new, self.seen)
        # 2. Share a growing prompt, and evict what a long forward has made due.
        if self._prompt_open:
            self.store.extend_prompt(new, self.seen, self.shard)
        if self.policy is not None and (self._prompt_open or q_len > 1):
            self._cut()
        return out

    def _attend_to(self, new: NewTokens, end: int) -> torch.Tensor:
        """Store, attend and take note of tokens whose last one is column `end - 1`."""
        self._append(new, end)
        out = self.store.attend(new, end)
        if self.observers:
            self._show(new)
        return out

    def _store(self, new: NewTokens, end: int) -> None:
        """Like `_attend_to`, where the output is already known."""
        self._append(new, end)
        self.store.sum_attention(new, end)
        self._show(new)

    def _append(self, new: NewTokens, end: int) -> None:
        """Store tokens, and keep what later evictions will ask with."""
        # A token that some rows do not have is none of a ring, and queries of no use are not kept.
        single = new.q_len == 1 and new.valid is None and not self._calm
        ring = self.queries.ring if single else None
        self.store.append(new, end, ring)
        if self.policy is not None:
            self._remember(self.policy, new, written=ring is not None)

    def _show(self, new: NewTokens) -> None:
        """Let observers see tokens that have been stored and attended to."""
        for observer in self.observers:
            observer.attended(self, new)

    def _remember(self, policy: Policy, new: NewTokens, *, written: bool = False) -> None:
        """Take note of what later evictions will ask with; `written` if the ring has it."""
        self.settings = new.settings
        if self.state is not None and self.state.first is not self.store.first:
            self.state = self.state.with_first(self.store.first)
        if self._calm:
            self.queries.clear()
            return
        if new.q_len > 1:
            # It may make several evictions due, whose queries are needed until they have run.
            asked = policy.open_columns(self.state, self.seen)
            self.queries.resize(max(self.query_columns, asked))
        if written:
            self.queries.count_appended()
        else:
            self.queries.append(new.query)

    def _make_room(self, q_len: int) -> None:
        """Make sure that the store has room for `q_len` more tokens."""
        if self.policy is None:
            self.store.make_room(q_len)
        elif q_len > self.store.least_free:
            length = self.store.length + q_len
            wanted = length if self.state is None else self.state.capacity(length, self.seen)
            self.store.relayout(torch.maximum(self.store.capacity, wanted))

    def _fit(self, columns: int) -> None:
        """Give every head the slots that it should have when `columns` columns are stored."""
        target = None if self.state is None else self.state.fitted(self.store, columns)
        if target is not None:
            self.store.relayout(target)

    def adopt(self, state: RowState) -> None:
        """Hold from the next forward on what another state says."""
        self.state = state
        self._fit(self.seen)

    def take_back(self, q_len: int) -> None:
        """Undo a forward of `q_len` columns that was refused before or after they were stored."""
        if self.incoming is not None:
            self.incoming = None
            self.seen -= q_len
        else:
            self.store.forget_order()
            self._crop(q_len)

    # ---------------------------------------------------------------------------------- the prompt

    def store_first(self, new: NewTokens) -> None:
        """Take in the tokens of the first forward, which the base implementation attended to."""
        self.lazy_initialization(new.keys, new.values)
        policy = self.policy
        if policy is None or self.store.shares:
            if policy is not None:
                self._remember(policy, new)
            self.store.store_first(new, self.seen, self.shard)
            self._show(new)
            if policy is not None:
                self._cut()
        elif policy.cuts_incoming and not (
            self.record_past or policy.scorer.needs_cumulative_attention
        ):
            self._store_part(policy, new)
        else:
            self._store_whole(new)

    def _store_whole(self, new: NewTokens) -> None:
        """Store all tokens of the first forward, then cut them."""
        self.store.begin(new, self.seen)
        kept = new.real_tokens().sum(-1).cpu()
        self.store.allocate(kept, new)
        if self.record_past:
            # A draft follows the prompt and may be cropped; the next forward fixes the budgets.
            self._draft = Draft(new, self._snapshot(deep=False), token_by_token=False)
            self._prompt_open = False
        self._store(new, self.seen)
        if not self.record_past:
            self._cut()

    def _store_part(self, policy: Policy, new: NewTokens) -> None:
        """Store what stays of the first forward: what an eviction takes is never stored."""
        self.store.begin(new, self.seen)
        self._remember(policy, new)
        keep, statistics = new.real_tokens(), {}
        state = self._allocate(keep[..., : self._end_of_prompt()].sum(-1).cpu())
        counts = IncomingCounts(keep)
        rows = state.due(counts, self.seen, 0)
        state, span = state.next_span(rows, self.seen, counts)
        if span is not None:
            self._attended = AllPositions(keep.shape, new.valid)
            tokens = incoming_tokens(new, rows)
            state, held, chosen, _ = self._choose(state, span, tokens)
            keep[rows] = torch.zeros_like(keep[rows]).scatter_(-1, tokens.place, chosen)
            if held.scorer_state is not None:
                noted = torch.zeros_like(keep, dtype=torch.int32)
                noted[rows] = noted[rows].scatter_(-1, tokens.place, held.scorer_state)
                statistics["scorer_state"] = noted
        whole = new.valid is None and span is None
        self.state, capacity = state, state.capacity(keep.sum(-1).cpu(), self.seen)
        self.store.store_part(new, self.seen, capacity, None if whole else keep, **statistics)
        self._show(new)

    def _cut(self) -> None:
        """Fix what rows may hold while the prompt grows, and evict what a forward made due."""
        state = self._require_state() if not self._prompt_open else self._allocate()
        rows = state.due(self.store, self.seen, 0)
        if not rows.numel():
            self._fit(self.seen)
            return
        held = self.store.tokens.held()
        self._attended = HeldPositions(held.positions.clone(), held.layout, held.length)
        self._evict(state, rows, self.seen)

    def _allocate(self, held: torch.Tensor | None = None) -> RowState:
        """Say what every row may hold, now that the prompt has been stored.

        Parameters
        ----------
        held : LongTensor[B, H_kv], optional
            Tokens of the prompt that every head holds; those in the store by default.
        """
        if self.policy is None:
            raise ValueError(f"layer {self.index}: expected a policy, got a layer without one.")
        end, shared = self._end_of_prompt(), self.store.elsewhere
        if held is None:
            rows = torch.arange(len(self.store.first), device="cpu")
            held = self.store.before(rows, torch.full_like(rows, end))
        held = held + shared[:, None]
        prompt = PromptRows(self.store.first, end, held, shared, self.shard)
        self.state = self.policy.begin(prompt, self.state)
        return self.state

    def _require_state(self) -> RowState:
        if self.state is None:
            raise ValueError(f"layer {self.index}: expected a prompt, got a layer without one.")
        return self.state

    def _grows_prompt(self, begin: int, q_len: int) -> bool:
        """Whether `q_len` tokens from column `begin` on belong to the prompt."""
        length = None if self.policy is None else self.policy.prompt_length
        if length is None or (q_len == 1 and not self._by_token):
            # Of a prompt in chunks only the last can have a single token.
            more = q_len > 1 or begin + 1 == length
        else:
            more = begin < length
        return self._prompt_open and more and not self.record_past

    @property
    def prompt_is_complete(self) -> bool:
        """Whether what rows may hold has been fixed for good."""
        return self.is_initialized and not self._prompt_open

    @property
    def expects_prompt(self) -> bool:
        """Whether a single token would still be part of the prompt."""
        return self._grows_prompt(self.seen, 1)

    def _end_of_prompt(self) -> int:
        length = None if self.policy is None else self.policy.prompt_length
        return min(length or self.seen, self.seen)

    # ----------------------------------------------------------------------------------- evictions

    def _evict(self, state: RowState, rows: torch.Tensor, columns: int) -> None:
        """Evict from rows what is due when `columns` columns have been stored."""
        if not rows.numel():
            return
        while True:
            # 1. The policy says which tokens it wants to choose from.
            state, span = state.next_span(rows, columns, self.store)
            self.state = state
            if span is None:
                break
            # 2. What an attention mask hides goes first.
            self.evicted += self.store.evict_hidden(span.rows)
            # 3. Read, score, choose and evict the rest.
            tokens = self.store.read(span.rows, span.bounds)
            if not tokens.columns.shape[-1]:
                continue
            state, held, keep, kept = self._choose(state, span, tokens)
            if held.scorer_state is not None:
                self.store.write_scorer_state(tokens, held.scorer_state)
            self.store.evict(tokens, keep, kept)
        self.queries.resize(self.query_columns)
        self._fit(columns)

    def evicted_elsewhere(self, rows: torch.Tensor, kept: torch.Tensor, gone: int) -> None:
        """Take note that rows kept so many tokens, LongTensor[R, H_kv], and `gone` went in all."""
        pool = self.store.tokens
        pool.note_length(pool.length.index_put((rows,), kept))
        self.store.forget_order()
        self.evictions += rows.numel()
        self.evicted += gone
        self.queries.resize(self.query_columns)
        self._fit(self.seen)

    def _choose(
        self, state: RowState, span: EvictionSpan, tokens: StoredTokens
    ) -> tuple[RowState, HeldTokens, torch.Tensor, torch.Tensor]:
        """Choose what stays of some tokens, and count what goes.

        Returns
        -------
        state : RowState
        held : HeldTokens
            What the scorer has seen, with what it has noted.
        keep : BoolTensor[R, H_kv, N]
        kept : LongTensor[R, H_kv]
            How many that are, on the CPU.
        """
        policy = state.policy
        held = self._as_scored(policy, span, tokens)
        count = held.count.cpu() if tokens.count is None else tokens.count
        state, plan = state.plan(span, held, policy.scorer.score(held))
        kept = None
        if policy.risk is None:
            keep = plan.keep(plan.per_head)
            kept = plan.known(count)
        else:
            scale = self._scale(policy.risk.queries, span, tokens)
            keep, damage = policy.risk.choose(plan, scale, self.shard)
            self.risk = self.risk.add(span.rows, span.columns, damage)
        kept = keep.sum(-1).cpu() if kept is None else kept
        self.state = state = state.after(span, count, kept)
        self.evictions += span.rows.numel()
        self.evicted += int((count - kept).sum())
        return state, held, keep, kept

    def _as_scored(self, policy: Policy, span: EvictionSpan, tokens: StoredTokens) -> HeldTokens:
        """Describe tokens to a scorer."""
        prompt = span.first if span.prompt is None else span.prompt
        told = torch.stack([span.first, span.now, prompt])
        first, now, prompt = send(told, tokens.columns.device)
        queries, asked = self._queries_before(policy.queries, span, first, tokens.columns.shape[1])
        statistics = {name: tokens.field(name) for name in self.store.statistics}
        return HeldTokens(
            keys=tokens.field("keys"),
            positions=tokens.positions(first),
            valid=tokens.valid,
            length=now,
            scaling=self.settings["scaling"],
            layer=self.index,
            first_head=self.shard.first,
            load_values=partial(tokens.field, "values"),
            queries=queries,
            query_positions=asked,
            filler=tokens.filler,
            prompt=None if span.prompt is None else prompt,
            **statistics,
        )

    def _queries_before(
        self, wanted: int, span: EvictionSpan, first: torch.Tensor, heads: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the last `wanted` queries that a scorer is to know of, and their positions.

        Returns
        -------
        Tensor[R, H_kv, G, A, D] or None
        LongTensor[R, A] or None
            -1 for a query that there is not.
        """
        log = self.queries.last(span.rows) if wanted else None
        if log is None:
            return None, None
        device = log.device
        if span.low is None or span.high is None:
            log = log[:, :, -wanted:]
            return log.unflatten(1, (heads, -1)), span.newest(log.shape[2], first)
        asked = span.now[:, None] + torch.arange(-wanted, 0, device="cpu")
        place = span.first[:, None] + asked - (span.columns - log.shape[2])
        asked = asked.where((asked >= span.low[:, None]) & (place >= 0), -1)
        asked, place = send(torch.stack([asked, place.clamp_min(0)]), device)
        index = place[:, None, :, None].expand(-1, log.shape[1], -1, log.shape[3])
        return log.gather(2, index).unflatten(1, (heads, -1)), asked

    def _scale(self, wanted: int, span: EvictionSpan, tokens: StoredTokens) -> DamageScale:
        """Return what weighs evictions of some tokens, from all held, by the newest queries."""
        queries = self.queries.last(span.rows)
        if queries is None:
            raise ValueError(f"layer {self.index}: expected queries to measure with, got none.")
        queries = queries[:, :, -wanted:]
        device = queries.device
        first = send(span.first, device)
        every, place = tokens, None
        if span.low is not None and not tokens.whole:
            every = self.store.read(span.rows)
            older = every.columns < send(span.first + span.low, device)[:, None, None]
            begin = (older & every.valid).sum(-1, keepdim=True)
            # All are in order of column, so these are neighbours.
            place = begin + torch.arange(tokens.columns.shape[-1], device=device)
            place = place.masked_fill(~tokens.valid, -1)
        return DamageScale(
            queries=queries.unflatten(1, (tokens.columns.shape[1], -1)),
            query_positions=span.newest(queries.shape[2], first),
            keys=every.field("keys"),
            values=every.field("values"),
            key_positions=every.positions(first),
            settings=self.settings,
            place=place,
        )

    # ------------------------------------------------------------------------------ captured steps

    def prepare(self) -> None:
        """Do what must be done before one new token, so that the step itself does nothing else.

        Afterwards the step has static shapes, allocates nothing that stays, and never waits: it can
        be captured, and replayed if `static_parts` are the same objects.

        Raises
        ------
        ValueError
            If the layer has observers.
        """
        if self.observers:
            raise ValueError(
                "probes: expected plain decoding, got captured steps, which a shadow cannot "
                "follow; leave out decode_graphs, or the probes."
            )
        if self.policy is not None:
            self._begin(1)
            self.queries.make_ring(self.seen)
        self._prompt_open = False
        self._make_room(1)
        # Asked for here, so that it is not made within the step.
        _ = self.store.tokens.device_length

    def static_parts(self) -> Iterator[Any]:
        """Yield the objects that a captured step reads and writes where they are."""
        yield from self.store.static_parts()
        yield from self.queries.tensors()

    def advance(self) -> None:
        """Take note of one token per row that a replayed step has stored."""
        self.seen += 1
        self.store.advance()
        self.queries.count_appended()

    # ----------------------------------------------------------------------- drafts and other rows

    def _snapshot(self, *, deep: bool) -> Snapshot:
        """Remember the state that the next forward may have to be undone to."""
        # Tensors of the state are replaced, never written to, except the pool's.
        return Snapshot(
            store=self.store.snapshot(deep=deep),
            state=self.state,
            observers=tuple(observer.clone() for observer in self.observers),
            queries=self.queries.clone(),
            risk=self.risk,
            evictions=self.evictions,
            evicted=self.evicted,
        )

    def _attend_draft(self, new: NewTokens) -> torch.Tensor:
        """Attend to a draft as if its tokens came one by one, evictions between them included."""
        due = self._require_state().due(self.store, self.seen - new.q_len, new.q_len)
        crosses = bool(due.numel())
        self._draft = Draft(new, self._snapshot(deep=crosses), token_by_token=crosses)
        if not crosses:
            self._make_room(new.q_len)
            return self._attend_to(new, self.seen)
        return torch.cat([self._attend_to(*token) for token in self._tokens(new, self.seen)], 1)

    def _tokens(self, new: NewTokens, end: int) -> Iterator[tuple[NewTokens, int]]:
        """Yield single tokens and their end column, evicting what is due before each."""
        for index in range(new.q_len):
            column = end - new.q_len + index
            state = self._require_state()
            self._evict(state, state.due(self.store, column, 1), column)
            self._make_room(1)
            yield new.columns(index, index + 1), column + 1

    def activate_past_recording(self) -> None:
        """Expect a `crop` after every forward (assisted decoding).

        Raises
        ------
        ValueError
            If rows share their prompt and evict: the first forward would bring a draft together
            with it.
        """
        if self.policy is not None and self.store.shares:
            raise ValueError(
                "assisted decoding: expected branches that keep every token, got a suffix policy; "
                "use SharedBranchCache(config) without suffix, or generate without an assistant."
            )
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
        draft, self._draft = self._draft, None
        if draft is not None and columns <= draft.new.q_len:
            self._undo(draft, draft.new.columns(0, draft.new.q_len - columns))
            return
        # Attention that removed queries gave to tokens stays counted.
        self.store.crop(self.seen, columns)
        self.store.clear_scorer_state()
        self.queries.crop(columns)
        for observer in self.observers:
            observer.crop(self.seen)
        if self.state is not None:
            self.state = self.state.crop(self.seen).recount(self.store)

    def _undo(self, draft: Draft, accepted: NewTokens) -> None:
        """Go back to the layer before a draft, and store the accepted columns of it again."""
        before = draft.before
        self.store, self.state, self.observers = before.store, before.state, before.observers
        self.queries, self.risk = before.queries, before.risk
        self.evictions, self.evicted = before.evictions, before.evicted
        if draft.token_by_token:
            for token, end in self._tokens(accepted, self.seen):
                self._store(token, end)
        elif accepted.q_len:
            self._make_room(accepted.q_len)
            self._store(accepted, self.seen)

    def hide(self, hidden: torch.Tensor) -> None:
        """Follow another attention mask; see `PoolStore.hide`."""
        self.store.hide(hidden)
        for observer in self.observers:
            observer.hide(hidden)
        if self.state is not None:
            self.state = self.state.recount(self.store)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder rows: new row `i` copies row `rows[i]` (LongTensor, CPU)."""
        self.store.select_rows(rows)
        self._select_rows(rows)

    def fork(self, rows: torch.Tensor) -> None:
        """Like `select_rows`, for rows that will go on for long; see `PoolStore.fork`.

        Where rows evict, each copy does so on its own, and nothing is stored once.
        """
        if self.policy is None:
            self.store.fork(rows)
        else:
            self.store.select_rows(rows)
        self._select_rows(rows)

    def _select_rows(self, rows: torch.Tensor) -> None:
        """Let everything besides the tokens follow."""
        if self.shown is not None:
            self.shown = self.shown[send(rows, self.shown.device)]
        for observer in self.observers:
            observer.select_rows(rows)
        self.queries.select_rows(rows)
        self.risk = self.risk.select_rows(rows)
        if self.state is not None:
            self.state = self.state.select_rows(rows)
        self._draft = self._attended = None

    def add_row(self, path: Path, first: int) -> None:
        """Add a row behind the last one; see `BranchStore.add_row`, which the store must be."""
        store: Any = self.store
        store.add_row(path, first)
        if self.shown is not None:
            self.shown = torch.cat([self.shown, torch.ones_like(self.shown[:1])])

    # ---------------------------------------------------------------------- what transformers asks

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note device and type of the tokens that are stored from now on."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return the logical length: tokens seen, padding included, whatever is still held."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no limit to the logical length."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return logical key length and offset for the mask of `query_length` new tokens."""
        return LogicalLength(self.seen + query_length), 0

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
        self.record_past = False

    def offload(self) -> None:
        """Refuse: the pool must stay where its layer runs."""
        raise ValueError("offloading is not supported: the pool must stay on its layer's device.")

    # -------------------------------------------------------------------------------------- report

    def held(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: tokens held, on the CPU."""
        return self.store.held()

    def held_positions(self) -> list[list[list[int]]]:
        """Sorted columns that the last forward attended to, per row and KV head; padding is never
        listed.
        """
        if self._attended is None:
            return self.held_now()
        return self.store.with_shared(self._attended.lists())

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
            Zeros for padding; None before the first forward. Of latents and rotary keys, stock
            layers hold the first as keys and the second as values.

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
        if not self.rank:
            return self.store.dense(name, self.seen)
        # A value is a latent; a key has the rotary key behind it.
        latents = self.store.dense("keys", self.seen)
        return latents[..., : self.rank] if name == "keys" else latents[..., self.rank :]

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
        """Yield all tensors whose size grows with the tokens seen or held.

        Queries kept for scoring and what could be undone are among them.
        """
        yield from self.store.tensors()
        yield from self.queries.tensors()
        if self.shown is not None:
            yield self.shown
        if self._attended is not None:
            yield from self._attended.tensors()
        if self._draft is not None:
            yield from self._draft.tensors()

    @property
    def nbytes(self) -> int:
        """Bytes of all storages behind `tensors`, each counted once."""
        return distinct_bytes(self.tensors())
