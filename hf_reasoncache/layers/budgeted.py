"""A layer with a budget: a row whose buffer is full evicts down to it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from hf_reasoncache.layers.agreed_budgets import AgreedBudgets
from hf_reasoncache.layers.evicting import EvictingLayer
from hf_reasoncache.layers.policy import EvictionPolicy
from hf_reasoncache.layers.row_budgets import RowBudgets
from hf_reasoncache.layers.selection import EvictionContext, gather_held, incoming_held, rank
from hf_reasoncache.scorers.base import HeldTokens
from hf_reasoncache.storage.held_positions import AllPositions
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.pool_store import PoolStore

_NO_ROWS = torch.zeros(0, dtype=torch.long, device="cpu")


class BudgetedLayer(EvictingLayer):
    """One layer that holds a budget of tokens per KV head.

    Invariants between two forwards: no head holds more than its budget plus `policy.buffer`; the
    capacities of a row add up to exactly that; the newest `policy.window` columns and the protected
    prompt are held.

    Parameters
    ----------
    index : int
    rank : int
        Index among the evicting layers.
    policy : EvictionPolicy
    store : PoolStore, optional
    heads : LongTensor[B, H_kv], optional
        Tokens that each head of each row keeps, instead of the policy's budget.
    """

    policy: EvictionPolicy
    budgets: RowBudgets | None

    def __init__(
        self,
        index: int,
        rank: int,
        policy: EvictionPolicy,
        store: PoolStore | None = None,
        heads: torch.Tensor | None = None,
    ) -> None:
        self.rank, self.heads = rank, heads
        super().__init__(index, policy, store)

    def store_first(self, new: NewTokens) -> None:
        """See `EvictingLayer.store_first`; what a cut takes is never stored."""
        if self.record_past or self.policy.scorer.needs_mass or self.store.shares:
            super().store_first(new)
        else:
            self._store_cut(new)

    def _store_cut(self, new: NewTokens) -> None:
        batch, heads, steps, _ = new.keys.shape
        self.store.begin(new, self.seen)
        self._remember(new)
        keep, notes = new.real_tokens(), {}
        self._allocate_for(keep[..., : self._end_of_prompt()].sum(-1).cpu())
        rows = self._require_budgets().full(keep.sum(-1).cpu(), 0)
        if rows.numel():
            self._attended = AllPositions((batch, heads, steps), new.valid)
            occasion = self._occasion(rows, self.seen)
            held, column = incoming_held(
                new, occasion, keeps_notes="notes" in self.store.statistics
            )
            chosen = self._choose(occasion, held, column.masked_fill(~held.valid, -1))
            keep[rows] = torch.zeros_like(keep[rows]).scatter_(-1, column, chosen)
            if held.notes is not None:
                notes["notes"] = torch.zeros_like(keep, dtype=torch.int32)
                notes["notes"][rows] = notes["notes"][rows].scatter_(-1, column, held.notes)
        capacity = torch.maximum(self._require_budgets().capacity, keep.sum(-1).cpu())
        whole = new.valid is None and not rows.numel()
        self.store.store_part(new, self.seen, capacity, None if whole else keep, **notes)

    def _allocate(self) -> None:
        """See `EvictingLayer._allocate`."""
        pool = self.store.tokens
        slots, offset = pool.slots(torch.arange(pool.length.shape[0], device="cpu"))
        in_prompt = (pool.fields["positions"][slots] < self._end_of_prompt()) & (offset >= 0)
        self._allocate_for(in_prompt.sum(-1).cpu())

    def _allocate_for(self, prompt: torch.Tensor) -> None:
        """Fix the budgets of every row, given how many tokens `[B, H_kv]` its prompt has."""
        self._prompt_columns = self._end_of_prompt()
        elsewhere = self.store.elsewhere
        if self.store.shares:
            prompt = prompt + elsewhere[:, None]
        floor = prompt[:, 0] if self.policy.protect_prompt else torch.zeros_like(prompt[:, 0])
        protection = self._protect()
        if protection is not None:
            floor = torch.maximum(floor, protection.count)
        budgets = RowBudgets.equal(self.policy, self.rank, floor, prompt.shape[1])
        if self.heads is not None:
            budgets = budgets.given(self.heads)
        budgets = replace(budgets, protection=protection)
        if self.shard.agrees:
            budgets = AgreedBudgets.of(budgets, self.shard, self.budgets)
        # What branches share counts against the budget of each.
        self.budgets = budgets.without(elsewhere) if self.store.shares else budgets

    def _require_budgets(self) -> RowBudgets:
        if self.budgets is None:
            raise ValueError(f"layer {self.index}: expected budgets, got a layer without a prompt.")
        return self.budgets

    def _recount(self) -> None:
        """See `EvictingLayer._recount`."""
        self.budgets = self._require_budgets().recount(self.store.tokens.length)

    def _capacity(self, length: torch.Tensor) -> torch.Tensor:
        """See `EvictingLayer._capacity`."""
        return torch.maximum(self._require_budgets().capacity, length)

    def _room(self) -> int:
        """See `EvictingLayer._room`."""
        pool = self.store.pool
        if pool is None or self.budgets is None or self._prompt_open:
            return 0
        # Between two forwards every head has the capacity it should have.
        return pool.least_free - self.budgets.lead

    def _due(self, columns: int, steps: int) -> torch.Tensor:
        """Rows with a head that has no room for `steps` more tokens."""
        if 0 < steps <= self._room():
            return _NO_ROWS
        return self._require_budgets().full(self.store.tokens.length, steps)

    def _evict(self, rows: torch.Tensor, columns: int) -> None:
        """Compact `rows` to their budgets, when `columns` columns have been stored."""
        if not rows.numel():
            return
        self.evicted += self.store.evict_hidden(rows)
        pool, occasion = self.store.tokens, self._occasion(rows, columns)
        held, slots, offset, at = gather_held(pool, occasion)
        keep = self._choose(occasion, held, at)
        self._store_notes(held, slots)
        pool.compact(rows, slots, offset, keep)
        self.store.forget_order()
        self._fit()

    def _occasion(self, rows: torch.Tensor, columns: int) -> EvictionContext:
        queries, wanted = self.queries.last(), self.policy.scorer.queries
        if self.query_columns > wanted and queries is not None:
            queries = queries[:, :, -wanted:] if wanted else None
        asked = (columns, queries, self._scaling, self.index, self.shard.first)
        return EvictionContext(rows, self.store.first[rows], *asked)

    def _choose(
        self, occasion: EvictionContext, held: HeldTokens, at: torch.Tensor
    ) -> torch.Tensor:
        """Choose what stays of `held`, which lies in columns `at`; count what goes."""
        protected = at >= occasion.columns - self.policy.window
        if self.policy.protect_prompt:
            protected |= at < self._prompt_columns
        budgets = self._require_budgets()
        if budgets.protection is not None:
            protected |= budgets.protection.covers(occasion.rows, held.positions)
        select, budgets = rank(self.policy, budgets, occasion, held, protected)
        self.budgets = budgets
        where = (occasion.rows, occasion.columns)
        scale = partial(self._scale, *where, held.positions, partial(getattr, held))
        keep = self._decide(*where, select, budgets.bounds(occasion.rows), scale)
        self.budgets = budgets.after(occasion.rows, held.valid, keep)
        self.evictions += occasion.rows.numel()
        self.evicted += int((held.valid & ~keep).sum())
        return keep
