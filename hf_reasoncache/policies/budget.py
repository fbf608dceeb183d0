"""A budget of tokens per head: a row whose buffer is full evicts down to it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch

from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.policies.agreed_budgets import AgreedBudgets
from hf_reasoncache.policies.base import Policy, PromptRows, grown_protection
from hf_reasoncache.policies.row_budgets import RowBudgets
from hf_reasoncache.protection import Protection
from hf_reasoncache.risk import Risk
from hf_reasoncache.scorers.base import Scorer
from hf_reasoncache.scorers.key_norm import KeyNorm


@dataclass(frozen=True)
class BudgetPolicy:
    """The settings by which one layer holds a budget of tokens per KV head.

    Between two forwards no head holds more than its budget plus `buffer`; the capacities of a row
    add up to exactly that; the newest `window` columns and the protected prompt are held.

    Attributes
    ----------
    budget : int
        Tokens per KV head that stay after a compaction, on average over the layers. With a ratio,
        the least of them, protected tokens of the prompt not counted.
    buffer : int
        New tokens per head between two compactions.
    window : int
        Newest columns that are never evicted; counted inside the budget.
    scorer : Scorer
    head_budgets : bool
        Whether the heads of a layer share its budget by demand (ReasonAlloc, level 2) instead of
        equally.
    rule : BudgetRule
        How demand becomes the budgets of the layers.
    head_interval : int
        Columns between two re-allocations of the head budgets (Delta of the paper).
    protection : Protection or None
        Whitelist and fair eviction; None costs nothing.
    risk : Risk or None
        What is measured of an eviction's cost; None costs nothing.
    protect_prompt : bool
        Whether prompt tokens are never evicted.
    prompt_length : int or None
        Columns of the prompt; None takes the forwards before the first single-token one.
    demand : tuple of float or None
        Demand of each evicting layer (ReasonAlloc, level 1); None gives all layers the same budget.
    layer_rank : int
        Index of this layer in `demand`.
    ratio : float or None
        Share of the tokens seen that stay after a compaction, on average over the layers; None
        keeps `budget`.
    """

    budget: int
    buffer: int
    window: int
    scorer: Scorer
    head_budgets: bool
    protect_prompt: bool
    prompt_length: int | None = None
    demand: tuple[float, ...] | None = None
    rule: BudgetRule = field(default_factory=BudgetRule)
    head_interval: int = 128
    protection: Protection | None = None
    risk: Risk | None = None
    layer_rank: int = 0
    ratio: float | None = None

    may_evict: ClassVar[bool] = True
    cuts_incoming: ClassVar[bool] = True

    @property
    def moves_heads(self) -> bool:
        """See `Policy.moves_heads`."""
        return self.head_budgets or self.ratio is not None

    @property
    def keeps_slots(self) -> bool:
        """See `Policy.keeps_slots`."""
        return self.head_budgets

    def evicts_like(self, other: Policy) -> bool:
        """See `Policy.evicts_like`: where heads keep their slots, and nothing watches."""
        return (
            self.scorer.joins_layers
            and not self.moves_heads
            and self.risk is None
            and self.protection is None
            and _equal_but_rank(vars(self), vars(other))
        )

    @property
    def queries(self) -> int:
        """See `Policy.queries`."""
        return self.scorer.queries

    @property
    def query_columns(self) -> int:
        """See `Policy.query_columns`: the newest ones."""
        return self.scorer.queries

    def open_columns(self, state: RowBudgets | None, columns: int) -> int:
        """See `Policy.open_columns`: an eviction asks about the newest columns only."""
        return 0

    def begin(self, prompt: PromptRows, before: Any) -> RowBudgets:
        """See `Policy.begin`."""
        tokens = prompt.held[:, 0]
        known = None if before is None else before.protection
        protection = grown_protection(self.protection, prompt, known)
        protected = tokens if self.protect_prompt else torch.zeros_like(tokens)
        if protection is not None:
            protected = torch.maximum(protected, protection.count)
        budgets = RowBudgets(
            policy=self,
            first=prompt.first,
            prompt_columns=prompt.columns,
            heads=self.tokens_per_head(protected, prompt.held.shape[1], prompt.length),
            floor=protected + self.window,
            last_split=torch.full_like(tokens, -self.head_interval),
            shared=torch.zeros_like(tokens),
            protection=protection,
        )
        if prompt.shard.agrees:
            budgets = AgreedBudgets.of(budgets, prompt.shard, before)
        # What branches share counts against the budget of each.
        return budgets.without(prompt.shared) if bool(prompt.shared.any()) else budgets

    def counted(self) -> BudgetPolicy:
        """See `Policy.counted`: neither scores nor what watches evictions changes their number."""
        layer_rank = 0 if self.demand is None else self.layer_rank
        return replace(self, scorer=KeyNorm(), protection=None, risk=None, layer_rank=layer_rank)

    def tokens_per_head(
        self, protected: torch.Tensor, heads: int, seen: torch.Tensor
    ) -> torch.Tensor:
        """Tokens that stay of rows.

        Parameters
        ----------
        protected, seen : LongTensor[B]
            Protected tokens of the prompt, and all tokens that a row has seen.
        heads : int

        Returns
        -------
        LongTensor[B, heads]

        Raises
        ------
        ValueError
            If the budget cannot hold the protected tokens and the window.
        """
        rows = zip(protected.tolist(), seen.tolist(), strict=True)
        each = [self.layer_budget(count, length) for count, length in rows]
        return torch.tensor(each, device="cpu")[:, None].expand(-1, heads).contiguous()

    @property
    def remedy(self) -> str:
        """How to protect less."""
        return "pass protect=False" if self.protect_prompt else "protect fewer of its tokens"

    def require_room(self, prompt: int, listed: int) -> None:
        """See `Policy.require_room`."""
        self.layer_budget(max(prompt if self.protect_prompt else 0, listed), prompt)

    def layer_budget(self, prompt_tokens: int, seen: int) -> int:
        """Budget per head of this layer, for a row with `prompt_tokens` protected tokens of its
        prompt that has seen `seen` tokens.

        Parameters
        ----------
        prompt_tokens : int
            All of them, those of the whitelist, or 0.
        seen : int

        Raises
        ------
        ValueError
            If the budget cannot hold the prompt and the window.
        """
        floor, budget = prompt_tokens + self.window, self.budget
        if self.ratio is not None:
            budget = max(int(self.ratio * seen), prompt_tokens + self.budget)
        elif floor > self.budget:
            raise ValueError(
                f"budget too small: expected budget >= {floor} ({prompt_tokens} protected prompt "
                f"tokens and a window of {self.window}), got budget={self.budget}. Raise the "
                f"budget, shorten the prompt, or {self.remedy}."
            )
        if self.demand is None:
            return budget
        return _layer_budgets(self.rule, self.demand, budget, floor)[self.layer_rank]


def _equal_but_rank(settings: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether layers differ in nothing but their place; settings that are tensors must be one."""
    return settings.keys() == others.keys() and all(
        value is others[name]
        or (not isinstance(value, torch.Tensor) and bool(value == others[name]))
        for name, value in settings.items()
        if name != "layer_rank"
    )


@lru_cache(maxsize=256)
def _layer_budgets(
    rule: BudgetRule, demand: tuple[float, ...], budget: int, floor: int
) -> list[int]:
    # Every layer asks for the same split, once per row and prompt.
    return rule.layer_budgets(demand, budget, floor=floor)
