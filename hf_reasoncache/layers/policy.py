"""The settings by which a layer evicts, and what is common to all kinds of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch

from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.protection import Protection, RowProtection
from hf_reasoncache.risk import Probes, Risk
from hf_reasoncache.scorers.base import Scorer


class Policy(Protocol):
    """What every evicting layer must know."""

    @property
    def scorer(self) -> Scorer:
        """Ranks the tokens of a head."""
        ...

    @property
    def protect_prompt(self) -> bool:
        """Whether prompt tokens are never evicted."""
        ...

    @property
    def prompt_length(self) -> int | None:
        """Columns of the prompt; None takes the forwards before the first single-token one."""
        ...

    @property
    def protection(self) -> Protection | None:
        """Whitelist and fair eviction."""
        ...

    @property
    def risk(self) -> Risk | None:
        """What is measured of an eviction's cost; None measures nothing."""
        ...

    @property
    def probes(self) -> Probes | None:
        """Which heads have a shadow; None has none."""
        ...

    @property
    def may_evict(self) -> bool:
        """Whether anything is evicted once the text is long enough."""
        ...

    def require_room(self, prompt: int, listed: int) -> None:
        """Raise ValueError unless what is protected of a prompt can be held, as its first forward
        will.

        Parameters
        ----------
        prompt, listed : int
            Tokens of the prompt, and those of them in a whitelist.
        """
        ...


class Budgets(Protocol):
    """What the rows of a layer may hold; never written to, so a draft is undone by putting the old
    object back.
    """

    @property
    def protection(self) -> RowProtection | None:
        """Whitelist and fair eviction."""
        ...

    def select_rows(self, rows: torch.Tensor) -> Budgets:
        """Keep, repeat or reorder rows."""
        ...


@dataclass(frozen=True)
class EvictionPolicy:
    """What all evicting layers of a cache share.

    Attributes
    ----------
    budget : int
        Tokens per KV head that stay after a compaction, on average over the layers.
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
    probes : Probes or None
        Which heads have a shadow; None costs nothing.
    protect_prompt : bool
        Whether prompt tokens are never evicted.
    prompt_length : int or None
        Columns of the prompt; None takes the forwards before the first single-token one.
    demand : tuple of float or None
        Demand of each evicting layer (ReasonAlloc, level 1); None gives all layers the same budget.
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
    probes: Probes | None = None

    @property
    def may_evict(self) -> bool:
        """True: a budget is finite."""
        return True

    @property
    def remedy(self) -> str:
        """How to protect less."""
        return "pass protect_prompt=False" if self.protect_prompt else "protect fewer of its tokens"

    def require_room(self, prompt: int, listed: int) -> None:
        """See `Policy.require_room`."""
        self.layer_budget(0, max(prompt if self.protect_prompt else 0, listed))

    def layer_budget(self, rank: int, prompt_tokens: int) -> int:
        """Budget per head of one layer, for a row with `prompt_tokens` protected tokens of its
        prompt.

        Parameters
        ----------
        rank : int
            Index of the layer among the evicting layers.
        prompt_tokens : int
            All of them, those of the whitelist, or 0.

        Raises
        ------
        ValueError
            If the budget cannot hold the prompt and the window.
        """
        floor = prompt_tokens + self.window
        if floor > self.budget:
            raise ValueError(
                f"budget too small: expected budget >= {floor} ({prompt_tokens} protected prompt "
                f"tokens and a window of {self.window}), got budget={self.budget}. Raise the "
                f"budget, shorten the prompt, or {self.remedy}."
            )
        if self.demand is None:
            return self.budget
        return _layer_budgets(self.rule, self.demand, self.budget, floor)[rank]


@lru_cache(maxsize=256)
def _layer_budgets(
    rule: BudgetRule, demand: tuple[float, ...], budget: int, floor: int
) -> list[int]:
    # Every layer asks for the same split, once per row and prompt.
    return rule.layer_budgets(demand, budget, floor=floor)
