"""Windows of generated text, each compressed once, when it has been written."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch

from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.policies.base import Policy, PromptRows, grown_protection
from hf_reasoncache.policies.row_windows import RowWindows
from hf_reasoncache.protection import Protection
from hf_reasoncache.risk import Risk
from hf_reasoncache.scorers.base import Scorer
from hf_reasoncache.scorers.key_norm import KeyNorm

_SPARE = 16  # 1/16 of a long pool is free for growth, so that it moves every few windows

Slots = TypeVar("Slots", int, torch.Tensor)


@dataclass(frozen=True)
class WindowPolicy:
    """The settings by which one layer compresses its windows.

    Between two forwards all tokens from a row's next window on are held; of the windows before it
    each head holds what `RowWindows.kept` said, or less after a second pass; with a bound, no row
    held more than that per head when its last compaction ended.

    Attributes
    ----------
    window : int
        Tokens of a window.
    kept : int
        Tokens per head that stay of a whole window of generated text, on average over the heads.
    mean_kept : int
        `kept` on average over the layers, for which `max_budget` must have room.
    prompt_kept : int
        `kept` of a window of the prompt; only used when the prompt is not protected.
    recent : int
        Newest tokens that are in no window yet.
    chunk_share : float
        Share of the kept tokens that fill gaps, see `token2chunk`.
    scorer : Scorer
    head_budgets : bool
        Whether the heads share what is kept of a window by demand instead of equally.
    protect_prompt : bool
        Whether the prompt is never in a window.
    prompt_length : int or None
        Columns of the prompt; None takes the forwards before the first single-token one.
    phase : int
        Windows end at positions that leave this remainder when divided by `window`. Another phase
        in every layer spreads the work over the steps.
    max_budget : int or None
        Tokens per head that stay after a compaction, on average over the layers.
    demand : tuple of float or None
        Demand of each layer, by which the layers share `max_budget`.
    rule : BudgetRule
        How demand becomes the bounds of the layers.
    layer_rank : int
        Index of this layer in `demand`.
    protection : Protection or None
        Whitelist and fair eviction; None costs nothing.
    risk : Risk or None
        What is measured of an eviction's cost; None costs nothing.
    """

    window: int
    kept: int
    mean_kept: int
    prompt_kept: int
    recent: int
    chunk_share: float
    scorer: Scorer
    head_budgets: bool
    protect_prompt: bool
    prompt_length: int | None = None
    phase: int = 0
    max_budget: int | None = None
    demand: tuple[float, ...] | None = None
    rule: BudgetRule = field(default_factory=BudgetRule)
    layer_rank: int = 0
    protection: Protection | None = None
    risk: Risk | None = None

    cuts_incoming: ClassVar[bool] = False
    moves_heads: ClassVar[bool] = True
    keeps_slots: ClassVar[bool] = False

    def evicts_like(self, other: Policy) -> bool:
        """See `Policy.evicts_like`: layers compress in turns."""
        return False

    @property
    def queries(self) -> int:
        """See `Policy.queries`: none is older than the window."""
        return min(self.scorer.queries, self.window)

    @property
    def query_columns(self) -> int:
        """See `Policy.query_columns`: back to the oldest query that a complete window needs."""
        return self.queries + self.recent if self.queries else 0

    def open_columns(self, state: RowWindows | None, columns: int) -> int:
        """See `Policy.open_columns`: several windows may become complete at once."""
        if not self.query_columns:
            return 0
        if state is None:
            return 0 if self.protect_prompt else columns
        return state.open_columns(columns)

    def begin(self, prompt: PromptRows, before: Any) -> RowWindows:
        """See `Policy.begin`."""
        known = None if before is None else before.protection
        protection = grown_protection(self.protection, prompt, known)
        length = prompt.length
        protected = length if self.protect_prompt else torch.zeros_like(length)
        kept = protected if protection is None else torch.maximum(protected, protection.count)
        limits = [self.limit(tokens) for tokens in kept.tolist()]
        carried = None if self.protect_prompt else before
        return RowWindows(
            policy=self,
            first=prompt.first,
            prompt=length,
            start=protected if carried is None else carried.start,
            sweep=protected if carried is None else carried.sweep,
            # What branches share counts against the bound of each.
            limit=None
            if self.max_budget is None
            else torch.tensor(limits, device="cpu") - prompt.shared,
            shard=prompt.shard,
            protection=protection,
        )

    def counted(self) -> WindowPolicy:
        """See `Policy.counted`: neither scores nor what watches evictions changes their number."""
        layer_rank = 0 if self.demand is None else self.layer_rank
        return replace(self, scorer=KeyNorm(), protection=None, risk=None, layer_rank=layer_rank)

    @property
    def may_evict(self) -> bool:
        """False where all of a window stays: the cache is meant to be exact."""
        return self.kept < self.window or self.prompt_kept < self.window

    @property
    def ratio(self) -> float | None:
        """See `Policy.ratio`: what stays of every window, unless there is a bound."""
        return self.mean_kept / self.window if self.max_budget is None else None

    @property
    def guarded(self) -> bool:
        """Whether a head may keep more than it is to because of what that would cost."""
        return self.risk is not None and self.risk.guard is not None

    @property
    def keeps_unevenly(self) -> bool:
        """Whether the heads of a row may keep different numbers of tokens."""
        return self.head_budgets or self.guarded

    @property
    def remedy(self) -> str:
        """How to protect less."""
        return "pass protect=False" if self.protect_prompt else "protect fewer of its tokens"

    def require_room(self, prompt: int, listed: int) -> None:
        """See `Policy.require_room`."""
        self.limit(max(prompt if self.protect_prompt else 0, listed))
        self.require_whitelist(prompt, listed)

    def require_whitelist(self, prompt: int, listed: int, row: int | None = None) -> None:
        """Raise ValueError if a whitelist is more than may stay of a prompt of so many tokens."""
        kept = prompt * self.prompt_kept // self.window
        if listed > kept:
            where = "" if row is None else f" in row {row}"
            raise ValueError(
                f"protect: expected at most {kept} protected tokens{where}, what stays of a prompt "
                f"of {prompt} in a layer that keeps {self.prompt_kept} of {self.window}, got "
                f"{listed}. Raise prompt_ratio, or protect fewer tokens."
            )

    def limit(self, prompt_tokens: int) -> int | None:
        """Tokens per head that stay after a compaction of a row with `prompt_tokens` protected
        tokens of its prompt; None without a bound.

        Raises
        ------
        ValueError
            If the bound cannot hold the prompt, the recent tokens and a compressed window.
        """
        if self.max_budget is None:
            return None
        floor = prompt_tokens + self.recent + self.mean_kept
        if floor > self.max_budget:
            raise ValueError(
                f"max_budget too small: expected max_budget >= {floor} ({prompt_tokens} protected "
                f"prompt tokens, {self.recent} recent ones and {self.mean_kept} of a window), got "
                f"max_budget={self.max_budget}. Raise it, shorten the prompt, or {self.remedy}."
            )
        if self.demand is None:
            return self.max_budget
        return self.rule.layer_budgets(self.demand, self.max_budget, floor=floor)[self.layer_rank]

    def spare(self, longest: int) -> int:
        """Slots beyond the next compaction for a pool whose longest head has `longest` tokens."""
        return max(self.kept, longest // _SPARE)

    def rounded(self, slots: Slots) -> Slots:
        """Round up, to few different capacities."""
        step = max(1, self.window // 4)
        return (slots + step - 1) // step * step
