"""How many tokens every head of every row keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch

from hf_reasoncache.budgets.heads import head_budgets
from hf_reasoncache.policies.base import Counts, EvictionSpan, RowState, of_rows
from hf_reasoncache.policies.plan import EvictionPlan, Positions, ranked
from hf_reasoncache.protection import RowProtection

if TYPE_CHECKING:
    from hf_reasoncache.policies.budget import BudgetPolicy


@dataclass(frozen=True, eq=False)
class RowBudgets(RowState):
    """Budgets of one layer; rows are independent, and changes give a new object.

    Invariant: a row's head budgets add up to `H_kv` times the budget of its layer.

    Attributes
    ----------
    policy : BudgetPolicy
    first : LongTensor[B]
        See `RowState.first`.
    prompt_columns : int
        Columns of the prompt.
    heads : LongTensor[B, H_kv]
        Tokens per head after a compaction, on the CPU.
    floor : LongTensor[B]
        Protected prompt tokens and the window: what no head may go below.
    last_split : LongTensor[B]
        Columns stored when the row's heads were last re-allocated.
    shared : LongTensor[B]
        Tokens that every head of the row holds elsewhere; neither `heads` nor `floor` has them.
    protection : RowProtection or None
    """

    policy: BudgetPolicy
    first: torch.Tensor
    prompt_columns: int
    heads: torch.Tensor
    floor: torch.Tensor
    last_split: torch.Tensor
    shared: torch.Tensor
    protection: RowProtection | None = None

    joins: ClassVar[bool] = True

    def check_prompt(self) -> None:
        """See `RowState.check_prompt`."""
        if self.protection is not None:
            self.protection.check()

    # --------------------------------------------------------------------------------- what is due

    def room(self, counts: Counts, columns: int) -> int:
        """See `RowState.room`: between two forwards every head has the capacity it should have.

        With a ratio, heads whose slots are rounded up by less than others have room for more.
        """
        return counts.least_free - self._spare

    def due(self, counts: Counts, columns: int, q_len: int) -> torch.Tensor:
        """See `RowState.due`: rows with a head that has no room for so many tokens."""
        return self._full(counts.length, q_len).nonzero()[:, 0]

    def _full(self, length: torch.Tensor, q_len: int) -> torch.Tensor:
        """BoolTensor[B]: rows with a head that has no room for `q_len` more than `length`."""
        return (length + q_len > self.heads + self.policy.buffer).any(-1)

    def next_span(
        self, rows: torch.Tensor, columns: int, counts: Counts
    ) -> tuple[RowBudgets, EvictionSpan | None]:
        """See `RowState.next_span`: all that a full row holds, once."""
        rows = rows[self._full(counts.length, 1)[rows]]
        if not rows.numel():
            return self, None
        first = self.first[rows]
        state = self if self.policy.ratio is None else self._grown(rows, columns - first)
        prompt = self.prompt_columns - first
        return state, EvictionSpan(rows, columns, first, columns - first, prompt=prompt)

    def join(
        self, others: Sequence[RowState], rows: torch.Tensor, columns: int
    ) -> tuple[RowState, EvictionSpan]:
        """See `RowState.join`."""
        # Their policies evict like this one's, so they are of this kind.
        states = [self, *others]

        def of_all(name: str) -> torch.Tensor:
            return of_rows([getattr(each, name) for each in states], rows)

        first = of_all("first")
        joined = replace(
            self,
            first=first,
            heads=of_all("heads"),
            floor=of_all("floor"),
            last_split=of_all("last_split"),
            shared=of_all("shared"),
        )
        every = torch.arange(len(first), device="cpu")
        return joined, EvictionSpan(every, columns, first, columns - first)

    # ----------------------------------------------------------------------------- how much stays

    def quota(self, span: EvictionSpan, count: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
        """See `RowState.quota`: the budget of each head."""
        return self.heads[span.rows]

    def plan(
        self, span: EvictionSpan, tokens: Positions, scores: torch.Tensor
    ) -> tuple[RowBudgets, EvictionPlan]:
        """See `RowState.plan`; heads are re-allocated where that is due.

        Of the buffer a quarter stays free at least, or evictions would come at every step.
        """
        forced, buffer = self._protected(span, tokens), self.policy.buffer
        ranks = ranked(tokens, scores, forced)
        state = self._resplit(span, ranks, tokens.valid)
        heads = state.heads[span.rows]
        floor = self.floor[span.rows, None].expand_as(heads)
        plan = EvictionPlan(
            rows=span.rows,
            tokens=tokens,
            scores=scores,
            ranks=ranks,
            forced=forced,
            per_head=heads,
            bounds=(floor, heads + buffer - max(1, buffer // 4)),
            protection=self.protection,
        )
        return state, plan

    def _protected(self, span: EvictionSpan, tokens: Positions) -> torch.Tensor:
        """Tokens that stay whatever their score: window, prompt and whitelist."""
        at, seen = tokens.positions, tokens.length[:, None, None]
        protected = at >= seen - self.policy.window
        if self.policy.protect_prompt:
            protected |= at < seen - (span.columns - self.prompt_columns)
        if self.protection is not None:
            protected |= self.protection.covers(span.rows, at)
        return protected & tokens.valid

    def without(self, tokens: torch.Tensor) -> RowBudgets:
        """Leave out what every head holds elsewhere, LongTensor[B]."""
        state = self._sharing(self._all_heads - tokens[:, None])
        return replace(state, floor=self.floor - tokens, shared=self.shared + tokens)

    @property
    def _all_heads(self) -> torch.Tensor:
        """LongTensor[B, H]: tokens after a compaction, of all heads of the layer."""
        return self.heads

    def _sharing(self, everyone: torch.Tensor) -> RowBudgets:
        """The same with other budgets for all heads of the layer."""
        return replace(self, heads=everyone)

    def _grown(self, rows: torch.Tensor, seen: torch.Tensor) -> RowBudgets:
        """Give rows their share of the tokens that they have seen; every head gets as many more."""
        everyone, shared = self._all_heads, self.shared[rows]
        protected = self.floor[rows] - self.policy.window + shared
        wanted = self.policy.tokens_per_head(protected, 1, seen)[:, 0] - shared
        before = everyone[rows].sum(-1) // everyone.shape[1]
        # The split over layers rounds; nothing is taken back for that.
        more = (wanted - before).clamp_min(0)[:, None]
        return self._sharing(everyone.index_put((rows,), everyone[rows] + more))

    def _resplit(self, span: EvictionSpan, ranks: torch.Tensor, valid: torch.Tensor) -> RowBudgets:
        """Re-allocate the heads of those rows whose last allocation is old enough."""
        if not self.policy.head_budgets:
            return self
        old_enough = span.columns - self.last_split[span.rows] >= self.policy.head_interval
        stale = old_enough.nonzero()[:, 0]
        if not stale.numel():
            return self
        at = stale.to(ranks.device, non_blocking=True)
        return self._split(span.rows[stale], ranks[at], valid[at], span.columns)

    def _split(
        self, rows: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor, columns: int
    ) -> RowBudgets:
        """Re-allocate the heads of `rows`.

        Parameters
        ----------
        rows : LongTensor[R]
        scores : Tensor[R, H_kv, N]
            +inf for protected tokens.
        valid : BoolTensor[R, H_kv, N]
        columns : int
            Columns stored so far.
        """
        split = self._shares(self.heads, rows, scores, valid)
        return replace(
            self,
            heads=self.heads.index_put((rows,), split),
            last_split=self.last_split.index_fill(0, rows, columns),
        )

    def _shares(
        self, heads: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """LongTensor[R, H]: the tokens that some heads have together, shared out by demand."""
        return head_budgets(
            scores,
            valid,
            heads[rows].sum(-1),
            floor=self.floor[rows],
            comparable=self.policy.scorer.comparable,
        ).cpu()

    # -------------------------------------------------------------------------------------- slots

    def capacity(self, length: torch.Tensor, columns: int) -> torch.Tensor:
        """See `RowState.capacity`: room for budget and buffer."""
        return torch.maximum(self._slots, length)

    @cached_property
    def _slots(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: slots for budget and buffer, rounded up where a budget grows.

        By an eighth at most, so that the pool moves eight times until it is twice as large, and not
        at every compaction.
        """
        need = self.heads + self.policy.buffer
        if self.policy.ratio is None:
            return need
        step = (1 << (need.double().frexp().exponent.long() - 4).clamp_min(0)).to(need)
        return (need + step - 1) // step * step

    @cached_property
    def _spare(self) -> int:
        """Most slots of a head beyond its budget and buffer."""
        if self.policy.ratio is None:
            return 0
        return int((self._slots - self.heads).max()) - self.policy.buffer

    def fitted(self, counts: Counts, columns: int) -> torch.Tensor | None:
        """See `RowState.fitted`."""
        target = self.capacity(counts.length, columns)
        return None if torch.equal(target, counts.capacity) else target

    # ---------------------------------------------------------------------------- drafts and rows

    def crop(self, columns: int) -> RowBudgets:
        """See `RowState.crop`."""
        return replace(self, prompt_columns=min(self.prompt_columns, columns))

    def select_rows(self, rows: torch.Tensor) -> RowBudgets:
        """See `RowState.select_rows`."""
        return replace(
            self,
            first=self.first[rows],
            heads=self.heads[rows],
            floor=self.floor[rows],
            last_split=self.last_split[rows],
            shared=self.shared[rows],
            protection=None if self.protection is None else self.protection.select_rows(rows),
        )
