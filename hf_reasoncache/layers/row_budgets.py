"""How many tokens every head of every row keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hf_reasoncache.budgets.heads import head_budgets
from hf_reasoncache.layers.policy import EvictionPolicy
from hf_reasoncache.protection import RowProtection


@dataclass(frozen=True, eq=False)
class RowBudgets:
    """Budgets of one layer; rows are independent, and changes give a new object.

    Invariant: a row's head budgets add up to `H_kv` times the budget of its layer.

    Attributes
    ----------
    policy : EvictionPolicy
    heads : LongTensor[B, H_kv]
        Tokens per head after a compaction, on the CPU.
    floor : LongTensor[B]
        Protected prompt tokens and the window: what no head may go below.
    last_split : LongTensor[B]
        Columns stored when the row's heads were last re-allocated.
    protection : RowProtection or None
    """

    policy: EvictionPolicy
    heads: torch.Tensor
    floor: torch.Tensor
    last_split: torch.Tensor
    protection: RowProtection | None = None

    @staticmethod
    def equal(policy: EvictionPolicy, rank: int, prompt: torch.Tensor, heads: int) -> RowBudgets:
        """Give all heads of a row the budget of layer `rank`.

        Parameters
        ----------
        policy : EvictionPolicy
        rank : int
            Index of the layer among the evicting layers.
        prompt : LongTensor[B]
            Protected prompt tokens of each row.
        heads : int
            KV heads.

        Raises
        ------
        ValueError
            If the budget cannot hold the prompt and the window.
        """
        per_head = torch.tensor(
            [policy.layer_budget(rank, count) for count in prompt.tolist()], device="cpu"
        )
        return RowBudgets(
            policy=policy,
            heads=per_head[:, None].expand(-1, heads).contiguous(),
            floor=prompt + policy.window,
            last_split=torch.full_like(prompt, -policy.head_interval),
        )

    def given(self, heads: torch.Tensor) -> RowBudgets:
        """Let heads keep as many tokens as `heads` says, LongTensor[B, H_kv].

        Raises
        ------
        ValueError
            If that is less than what no head may go below.
        """
        if bool((heads < self.floor[:, None]).any()):
            raise ValueError(
                f"heads: expected budgets >= {int(self.floor.max())} (protected prompt and window "
                f"of {self.policy.window}), got {int(heads.min())}; raise the smallest budget or "
                "do not protect the prompt."
            )
        return replace(self, heads=heads)

    @property
    def capacity(self) -> torch.Tensor:
        """LongTensor[B, H_kv]: what a head may hold between two compactions."""
        return self.heads + self.policy.buffer

    def bounds(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens per head after a compaction, and the least and the most that a guard may give.

        A quarter of the buffer stays free, or evictions would come at every step.
        """
        heads, buffer = self.heads[rows], self.policy.buffer
        least = self.floor[rows, None].expand_as(heads)
        return heads, least, heads + buffer - max(1, buffer // 4)

    @property
    def lead(self) -> int:
        """How many more free slots heads here may have than the fullest head elsewhere."""
        return 0

    def after(self, rows: torch.Tensor, valid: torch.Tensor, keep: torch.Tensor) -> RowBudgets:
        """Take note that `rows` kept `keep` of the tokens `valid`, BoolTensor[R, H_kv, N]."""
        return self

    def recount(self, length: torch.Tensor) -> RowBudgets:
        """Take note that the heads hold `length` tokens, LongTensor[B, H_kv]."""
        return self

    def full(self, length: torch.Tensor, steps: int) -> torch.Tensor:
        """Rows with a head that has no room for `steps` more tokens.

        Parameters
        ----------
        length : LongTensor[B, H_kv]
            Tokens held, on the CPU.
        steps : int
        """
        return (length + steps > self.capacity).any(-1).nonzero()[:, 0]

    def without(self, tokens: torch.Tensor) -> RowBudgets:
        """Leave out what every head holds elsewhere, LongTensor[B]."""
        return replace(self, heads=self.heads - tokens[:, None], floor=self.floor - tokens)

    def resplit(
        self, rows: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor, columns: int
    ) -> RowBudgets:
        """Re-allocate the heads of those `rows` whose last allocation is old enough.

        Parameters
        ----------
        rows : LongTensor[R]
        scores : Tensor[R, H_kv, N]
            +inf for protected tokens.
        valid : BoolTensor[R, H_kv, N]
        columns : int
            Columns stored so far.
        """
        old_enough = columns - self.last_split[rows] >= self.policy.head_interval
        stale = old_enough.nonzero()[:, 0]
        if not self.policy.head_budgets or not stale.numel():
            return self
        at = stale.to(scores.device)
        return self._split(rows[stale], scores[at], valid[at], columns)

    def _split(
        self, rows: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor, columns: int
    ) -> RowBudgets:
        """Re-allocate the heads of `rows`; arguments as in `resplit`."""
        split = head_budgets(
            scores,
            valid,
            self.heads[rows].sum(-1),
            floor=self.floor[rows],
            comparable=self.policy.scorer.comparable,
        ).cpu()
        return replace(
            self,
            heads=self.heads.index_put((rows,), split),
            last_split=self.last_split.index_fill(0, rows, columns),
        )

    def select_rows(self, rows: torch.Tensor) -> RowBudgets:
        """Keep, repeat or reorder rows."""
        return replace(
            self,
            heads=self.heads[rows],
            floor=self.floor[rows],
            last_split=self.last_split[rows],
            protection=None if self.protection is None else self.protection.select_rows(rows),
        )
