"""A pooled layer with a budget: knows which rows must evict, and evicts, row by row.

Rows are independent. A row in a padded batch evicts at the same tokens as that row alone.
"""

from __future__ import annotations

import torch

from hf_reasoncache.layers.chunk import Chunk
from hf_reasoncache.layers.policy import EvictionPolicy
from hf_reasoncache.layers.pooled import PooledLayer
from hf_reasoncache.layers.query_log import QueryLog
from hf_reasoncache.layers.row_budgets import RowBudgets
from hf_reasoncache.layers.selection import Occasion, choose, gather_held
from hf_reasoncache.scorers.base import HeldTokens

_STATISTICS = {"mass": torch.float32, "notes": torch.int32}
_NO_ROWS = torch.zeros(0, dtype=torch.long)


class BudgetedLayer(PooledLayer):
    """Budgets of one layer, and what brings its heads down to them.

    Attributes
    ----------
    budgets : RowBudgets or None
        None until the prompt is complete.
    evictions : int
        Compactions so far, each row counted.
    evicted : int
        Tokens evicted so far, each row and head counted.
    """

    def __init__(self, index: int, rank: int, policy: EvictionPolicy) -> None:
        self.rank, self.policy = rank, policy
        wanted = {"mass": policy.scorer.needs_mass, "notes": policy.scorer.keeps_notes}
        self.statistics = {name: _STATISTICS[name] for name in wanted if wanted[name]}
        super().__init__(index)

    def _clear(self) -> None:
        super()._clear()
        self.budgets: RowBudgets | None = None
        self.evictions = self.evicted = 0
        self._log = QueryLog(self.policy.scorer.queries)
        self._prompt_columns = 0

    def _remember(self, chunk: Chunk) -> None:
        """Take note of what scoring will need."""
        self._log.append(chunk.query)
        self._scaling = chunk.settings["scaling"]

    def _end_of_prompt(self) -> int:
        return min(self.policy.prompt_length or self.seen, self.seen)

    def _allocate_held(self) -> None:
        """`_allocate` for the prompt that the pool holds."""
        pool = self._require_pool()
        slots, offset = pool.slots(torch.arange(pool.length.shape[0]))
        in_prompt = (pool.fields["positions"][slots] < self._end_of_prompt()) & (offset >= 0)
        self._allocate(in_prompt.sum(-1).cpu())

    def _allocate(self, prompt: torch.Tensor) -> None:
        """Fix the budgets of every row, given how many tokens `[B, H_kv]` its prompt has."""
        self._prompt_columns = self._end_of_prompt()
        floor = prompt[:, 0] if self.policy.protect_prompt else torch.zeros_like(prompt[:, 0])
        self.budgets = RowBudgets.equal(self.policy, self.rank, floor, prompt.shape[1])

    def _require_budgets(self) -> RowBudgets:
        if self.budgets is None:
            raise ValueError(f"layer {self.index}: expected budgets, got a layer without a prompt.")
        return self.budgets

    def _due(self, steps: int) -> torch.Tensor:
        """Rows that must evict before `steps` new tokens, given the capacity they should have."""
        pool = self._require_pool()
        if 0 < steps <= pool.least_free:
            # Between two forwards every head has the capacity it should have.
            return _NO_ROWS
        over = pool.length + steps > self._require_budgets().capacity
        return over.any(-1).nonzero()[:, 0]

    def _make_room(self, steps: int) -> None:
        pool = self._require_pool()
        if steps > pool.least_free:
            pool.relayout(torch.maximum(pool.capacity, pool.length + steps))

    def _fit(self) -> None:
        """Give every head exactly the capacity it should have."""
        pool = self._require_pool()
        target = torch.maximum(self._require_budgets().capacity, pool.length)
        if not torch.equal(target, pool.capacity):
            pool.relayout(target)

    def _evict(self, rows: torch.Tensor, columns: int) -> None:
        """Compact `rows` to their budgets, when `columns` columns have been stored."""
        if not rows.numel():
            return
        pool, occasion = self._require_pool(), self._occasion(rows, columns)
        held, slots, offset, at = gather_held(pool, occasion)
        keep = self._choose(occasion, held, at)
        if held.notes is not None:
            pool.fields["notes"][slots[held.valid]] = held.notes[held.valid]
        pool.compact(rows, slots, offset, keep)
        self._tail = 0
        self._fit()

    def _occasion(self, rows: torch.Tensor, columns: int) -> Occasion:
        queries = self._log.last()
        return Occasion(rows, self.first[rows], columns, queries, self._scaling, self.index)

    def _choose(self, occasion: Occasion, held: HeldTokens, at: torch.Tensor) -> torch.Tensor:
        """Choose what stays of `held`, which lies in columns `at`; count what goes."""
        protected = at >= occasion.columns - self.policy.window
        if self.policy.protect_prompt:
            protected |= at < self._prompt_columns
        budgets = self._require_budgets()
        keep, self.budgets = choose(self.policy, budgets, occasion, held, protected)
        self.evictions += occasion.rows.numel()
        self.evicted += int((held.valid & ~keep).sum())
        return keep
