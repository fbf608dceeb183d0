"""What a layer asks of a policy, and what it tells it.

A `Policy` is settings. When a prompt has been stored it makes the `RowState` of the batch, which
knows what is due and what goes. States are never written to: whatever changes them returns a new
one, so that a draft is undone by keeping the old one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast

import torch

from hf_reasoncache.policies.plan import EvictionPlan, Positions
from hf_reasoncache.protection import Protection, RowProtection
from hf_reasoncache.risk import Risk
from hf_reasoncache.scorers.base import Scorer
from hf_reasoncache.shards import Shard


class Counts(Protocol):
    """How much every head of a layer holds, as a store knows it; all on the CPU."""

    @property
    def length(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: tokens held in slots of its own."""
        ...

    @property
    def capacity(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: slots."""
        ...

    @property
    def least_free(self) -> int:
        """Fewest free slots of a head."""
        ...

    def before(self, rows: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """LongTensor[R, H_kv]: tokens of some rows before a column of each, LongTensor[R]."""
        ...


@dataclass(frozen=True, eq=False)
class PromptRows:
    """The prompts of a batch, as far as they have been read; on the CPU.

    Attributes
    ----------
    first : LongTensor[B]
        Column of each row's first real token; -1 while a row has only seen padding.
    columns : int
        Columns of the padded sequence, from 0 on, that belong to the prompt.
    held : LongTensor[B, H_kv]
        Tokens of it that every head holds.
    shared : LongTensor[B]
        Those of them that rows share, which lie in no pool.
    shard : Shard
        Which heads of the layer these are.
    """

    first: torch.Tensor
    columns: int
    held: torch.Tensor
    shared: torch.Tensor
    shard: Shard

    @property
    def length(self) -> torch.Tensor:
        """LongTensor[B]: columns from a row's first real token to the end of the prompt."""
        return (self.columns - self.first).where(self.first >= 0, 0)


@dataclass(frozen=True, eq=False)
class EvictionSpan:
    """Tokens of some rows of which a part is to go.

    Attributes
    ----------
    rows : LongTensor[R]
        On the CPU, like all that follows.
    columns : int
        Columns of the padded sequence that have been stored.
    first : LongTensor[R]
        Column of each row's first real token.
    now : LongTensor[R]
        Tokens that a scorer takes each row to have seen.
    low, high : LongTensor[R] or None
        First position of each row to choose from, and first one after it not to; None takes all
        that is held.
    kept : LongTensor[R] or None
        Tokens per head that are to stay on average; None where that is not the same for all spans
        of a kind.
    prompt : LongTensor[R] or None
        Tokens of each row's prompt, for scorers; None does not say.
    """

    rows: torch.Tensor
    columns: int
    first: torch.Tensor
    now: torch.Tensor
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    prompt: torch.Tensor | None = None

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Columns to choose from, two of LongTensor[R]; None for all."""
        if self.low is None or self.high is None:
            return None
        return self.first + self.low, self.first + self.high

    def newest(self, count: int, first: torch.Tensor) -> torch.Tensor:
        """LongTensor[R, count]: positions of the newest columns, -1 before a row's first token.

        `first` is that of the span on the device of the result.
        """
        columns = torch.arange(self.columns - count, self.columns, device=first.device)
        return (columns - first[:, None]).clamp_min(-1)


class RowState(ABC):
    """What the rows of a layer may hold, and what is due.

    A frozen dataclass. Whoever inherits from it writes `room`, `due`, `next_span`, `quota`, `plan`,
    `capacity`, `fitted` and `select_rows`; the rest is right for rows whose state is a matter of
    columns alone.

    Attributes
    ----------
    policy : Policy
        The settings that made it.
    first : LongTensor[B]
        Column of each row's first real token, on the CPU; -1 while there is none.
    joins : bool
        Whether rows of several layers may be taken for rows of one state.
    """

    policy: Policy
    first: torch.Tensor

    joins: ClassVar[bool] = False

    @abstractmethod
    def room(self, counts: Counts, columns: int) -> int:
        """How many more tokens make nothing due, `columns` columns being stored; cheap."""

    @abstractmethod
    def due(self, counts: Counts, columns: int, q_len: int) -> torch.Tensor:
        """Rows (LongTensor[R]) that must evict before `q_len` more tokens are stored."""

    @abstractmethod
    def next_span(
        self, rows: torch.Tensor, columns: int, counts: Counts
    ) -> tuple[RowState, EvictionSpan | None]:
        """Return what rows that are due must evict from next; None if nothing more is due."""

    @abstractmethod
    def quota(self, span: EvictionSpan, count: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
        """How many tokens of a span every head keeps, whatever they score.

        Parameters
        ----------
        span : EvictionSpan
        count, forced : LongTensor[R, H_kv]
            Tokens of the span that each head holds, and those of them that stay in any case.

        Returns
        -------
        LongTensor[R, H_kv]
        """

    @abstractmethod
    def plan(
        self, span: EvictionSpan, tokens: Positions, scores: torch.Tensor
    ) -> tuple[RowState, EvictionPlan]:
        """Say what is to stay of a span.

        Parameters
        ----------
        span : EvictionSpan
            As `next_span` returned it.
        tokens : Positions
            What heads hold of it.
        scores : Tensor[R, H_kv, N]
        """

    @abstractmethod
    def capacity(self, length: torch.Tensor, columns: int) -> torch.Tensor:
        """Slots (LongTensor[B, H_kv]) for heads that hold `length` tokens of `columns` columns."""

    @abstractmethod
    def fitted(self, counts: Counts, columns: int) -> torch.Tensor | None:
        """Slots that heads should have now, LongTensor[B, H_kv]; None where they have them."""

    @abstractmethod
    def select_rows(self, rows: torch.Tensor) -> RowState:
        """Keep, repeat or reorder rows (LongTensor, CPU)."""

    def with_first(self, first: torch.Tensor) -> RowState:
        """Take note that more rows have begun."""
        changed: Any = self
        return cast(RowState, replace(changed, first=first))

    def check_prompt(self) -> None:  # noqa: B027
        """Raise ValueError unless what is to be protected fits the prompt, which is complete."""

    def expected(self, span: EvictionSpan, counts: Counts) -> torch.Tensor:
        """Tokens of a span that each head holds, as far as counts tell, LongTensor[R, H_kv]."""
        return counts.length[span.rows]

    def after(self, span: EvictionSpan, count: torch.Tensor, kept: torch.Tensor) -> RowState:
        """Take note that heads kept `kept` of `count` tokens of a span, LongTensor[R, H_kv]."""
        return self

    def join(
        self, others: Sequence[RowState], rows: torch.Tensor, columns: int
    ) -> tuple[RowState, EvictionSpan]:
        """Take rows of several layers for rows of one state, to evict from them at once.

        Parameters
        ----------
        others : sequence of RowState
            Those of the other layers; their policies evict like this one's.
        rows : LongTensor[R]
            Rows of each layer, all due.
        columns : int
            Columns that every layer has stored.

        Returns
        -------
        tuple of RowState and EvictionSpan
            The span's rows are those of the first layer, then of the others.

        Raises
        ------
        ValueError
            If evictions of this kind change the state of a layer, or need more than one span; see
            `joins`.
        """
        raise ValueError(f"join: expected states that can be joined, got {type(self).__name__}.")

    def recount(self, counts: Counts) -> RowState:
        """Take note that heads have lost tokens otherwise than by an eviction, or got them back."""
        return self

    def crop(self, columns: int) -> RowState:
        """Go back to `columns` columns."""
        return self


class Policy(Protocol):
    """The settings by which a layer evicts.

    A frozen dataclass. Whoever inherits from it writes `scorer` and `begin`, and overrides what the
    defaults do not say.
    """

    @property
    def scorer(self) -> Scorer:
        """Ranks the tokens of a head."""
        ...

    def begin(self, prompt: PromptRows, before: Any) -> RowState:
        """Say what rows may hold, now that a prompt has been stored or has grown.

        Parameters
        ----------
        prompt : PromptRows
        before : RowState or None
            What this policy has said of a shorter part of the prompt.

        Raises
        ------
        ValueError
            If what is protected of the prompt cannot be held.
        """
        ...

    @property
    def protect_prompt(self) -> bool:
        """Whether prompt tokens are never evicted."""
        return False

    @property
    def prompt_length(self) -> int | None:
        """Columns of the prompt; None takes the forwards before the first single-token one."""
        return None

    @property
    def protection(self) -> Protection | None:
        """Whitelist and fair eviction."""
        return None

    @property
    def risk(self) -> Risk | None:
        """What is measured of an eviction's cost; None measures nothing."""
        return None

    @property
    def ratio(self) -> float | None:
        """Share of the tokens seen that rows keep; None for a number of tokens."""
        return None

    @property
    def may_evict(self) -> bool:
        """Whether anything is evicted once the text is long enough."""
        return True

    @property
    def head_budgets(self) -> bool:
        """Whether heads of a layer share its budget by demand."""
        return False

    @property
    def moves_heads(self) -> bool:
        """Whether evictions may change how many slots heads have."""
        return True

    @property
    def keeps_slots(self) -> bool:
        """Whether heads get other shares of a layer's slots, whose number stays."""
        return False

    def evicts_like(self, other: Policy) -> bool:
        """Whether evictions of two layers may be done at once, by `RowState.join`."""
        return False

    @property
    def cuts_incoming(self) -> bool:
        """Whether one eviction at most is due after a prompt, before any of it is stored."""
        return False

    @property
    def queries(self) -> int:
        """Queries that the scorer is shown, at most."""
        return self.scorer.queries

    @property
    def query_columns(self) -> int:
        """Newest columns among which these queries are."""
        return self.queries

    def open_columns(self, state: Any, columns: int) -> int:
        """Newest columns whose queries evictions ask for that several tokens at once make due."""
        return 0

    def counted(self) -> Policy:
        """Return a policy that keeps as many tokens, whichever they are, for plans to compare."""
        return self

    def require_room(self, prompt: int, listed: int) -> None:
        """Raise ValueError unless what is protected of a prompt can be held, as `begin` will.

        Parameters
        ----------
        prompt, listed : int
            Tokens of the prompt, and those of them in a whitelist.
        """


def of_rows(tensors: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Join what some rows, in order, have in several layers: `[B, ...]` each to `[L * R, ...]`."""
    if len(rows) < len(tensors[0]):
        tensors = [tensor[rows] for tensor in tensors]
    return torch.cat([*tensors])


def grown_protection(
    protection: Protection | None, prompt: PromptRows, before: RowProtection | None
) -> RowProtection | None:
    """What is protected in each row, now that the prompt has grown to its present end."""
    if protection is None:
        return None
    return protection.for_rows(prompt.length) if before is None else before.grown(prompt.length)


def require_suffix(policy: Policy, *, probed: bool) -> None:
    """Raise ValueError unless a policy can leave a prompt alone that branches share.

    The prompt is held elsewhere: it counts against a row's budget, but is not scored, not evicted
    and not copied.
    """
    if not policy.protect_prompt:
        raise ValueError(
            "suffix: expected protect=True, got a policy that may evict the prompt; branches share "
            "it, and it cannot be evicted for one of them."
        )
    if policy.scorer.needs_cumulative_attention:
        raise ValueError(
            f"suffix: expected a scorer without cumulative attention, got {policy.scorer!r}: "
            "attention to a shared prompt keeps no account per branch. Use RKV or SnapKV."
        )
    if policy.risk is not None or probed:
        raise ValueError(
            "suffix: expected risk=None, got a policy that measures: the error of an output is "
            "measured over what one layer's pool holds, and the prompt of a branch is not in it."
        )
