"""Budgets of a layer whose heads are spread over several processes, as if one had them all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch

from hf_reasoncache.policies.base import Counts, EvictionSpan
from hf_reasoncache.policies.row_budgets import RowBudgets
from hf_reasoncache.shards import Shard


@dataclass(frozen=True, eq=False, kw_only=True)
class AgreedBudgets(RowBudgets):
    """What all heads of a layer may hold and do hold, the same in every process.

    New tokens come to all heads of a row at once, so between two evictions every process knows how
    much the others hold. Heads are shared out anew from the scores of all of them, one message; how
    much stays is then known, except if a guard may keep more, which takes another.

    Attributes
    ----------
    shard : Shard
    everyone : LongTensor[B, H]
        Tokens after a compaction, of all heads of the layer; `heads` are those of this process.
    behind : LongTensor[B, H]
        How many tokens fewer than the first head of this process each head of the layer holds.
    """

    shard: Shard
    everyone: torch.Tensor
    behind: torch.Tensor

    # Whoever evicts has to tell the other processes.
    joins: ClassVar[bool] = False

    @staticmethod
    def of(budgets: RowBudgets, shard: Shard, before: AgreedBudgets | None) -> AgreedBudgets:
        """Give the budget that all heads here have to all heads of the layer.

        Parameters
        ----------
        budgets : RowBudgets
        shard : Shard
        before : AgreedBudgets or None
            What it replaces; without any, all heads hold the same number of tokens.
        """
        everyone = budgets.heads[:, :1].repeat(1, shard.total or 1)
        behind = torch.zeros_like(everyone) if before is None else before.behind
        return AgreedBudgets(**vars(budgets), shard=shard, everyone=everyone, behind=behind)

    def room(self, counts: Counts, columns: int) -> int:
        """See `RowState.room`."""
        return super().room(counts, columns) - self._lead

    @cached_property
    def _lead(self) -> int:
        """How many more free slots heads here have than the fullest head elsewhere, rows apart; of
        which the largest.
        """
        free = self.everyone + self.behind
        own = self.shard.own(free, self.heads.shape[1])
        return int((own.amin(-1) - free.amin(-1)).max())

    def _full(self, length: torch.Tensor, q_len: int) -> torch.Tensor:
        """See `RowBudgets._full`; a head in another process counts like one here."""
        everyone = length[:, :1] - self.behind
        return (everyone + q_len > self.everyone + self.policy.buffer).any(-1)

    def select_rows(self, rows: torch.Tensor) -> AgreedBudgets:
        """See `RowBudgets.select_rows`."""
        chosen: AgreedBudgets = super().select_rows(rows)  # type: ignore[assignment]
        return replace(chosen, everyone=self.everyone[rows], behind=self.behind[rows])

    def after(self, span: EvictionSpan, count: torch.Tensor, kept: torch.Tensor) -> AgreedBudgets:
        """See `RowState.after`."""
        own, risk = kept.cpu(), self.policy.risk
        if risk is None or risk.guard is None:
            held = count.cpu()[:, :1] - self.behind[span.rows]
            everyone = torch.minimum(held, self.everyone[span.rows])
        else:
            everyone = self.shard.gather(own)
        behind = self.behind.index_put((span.rows,), own[:, :1] - everyone)
        return replace(self, behind=behind)

    def recount(self, counts: Counts) -> AgreedBudgets:
        """See `RowState.recount`; the processes tell each other."""
        length = counts.length
        return replace(self, behind=length[:, :1] - self.shard.gather(length))

    def _split(
        self, rows: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor, columns: int
    ) -> AgreedBudgets:
        """See `RowBudgets._split`; all processes compute the same from the scores of all heads."""
        held = valid.sum(-1).cpu()[:, :1] - self.behind[rows]
        # As wide as the fullest head of any process needs; filler comes last and scores nothing.
        spare = int(held.max()) - scores.shape[-1]
        own = scores.masked_fill(~valid, -torch.inf)
        found = self.shard.gather(torch.nn.functional.pad(own, (0, spare), value=-torch.inf))
        split = self._shares(self.everyone, rows, found, found > -torch.inf)
        everyone = self.everyone.index_put((rows,), split)
        return replace(
            self._sharing(everyone), last_split=self.last_split.index_fill(0, rows, columns)
        )

    @property
    def _all_heads(self) -> torch.Tensor:
        """See `RowBudgets._all_heads`."""
        return self.everyone

    def _sharing(self, everyone: torch.Tensor) -> AgreedBudgets:
        """See `RowBudgets._sharing`."""
        own = self.shard.own(everyone, self.heads.shape[1]).contiguous()
        return replace(self, everyone=everyone, heads=own)
