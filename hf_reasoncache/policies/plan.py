"""What an eviction is to keep, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from hf_reasoncache.policies.keep_top import keep_top
from hf_reasoncache.policies.token2chunk import token2chunk
from hf_reasoncache.protection import RowProtection


class Positions(Protocol):
    """Where tokens stand that a scorer has scored; `HeldTokens` without keys and values."""

    @property
    def positions(self) -> torch.Tensor:
        """LongTensor[R, H_kv, N]: ascending, from a row's first real token on; filler is -1."""
        ...

    @property
    def valid(self) -> torch.Tensor:
        """BoolTensor[R, H_kv, N]: False for filler, which comes last."""
        ...

    @property
    def length(self) -> torch.Tensor:
        """LongTensor[R]: tokens that the row has seen, by `EvictionSpan.now`."""
        ...

    @property
    def count(self) -> torch.Tensor:
        """LongTensor[R, H_kv]: tokens that are no filler."""
        ...

    def blank(self, numbers: torch.Tensor, value: float) -> torch.Tensor:
        """Return numbers with `value` for filler."""
        ...


def ranked(tokens: Positions, scores: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """Return scores with +inf for tokens that are forced to stay and -inf for filler."""
    return tokens.blank(scores.masked_fill(forced, torch.inf), -torch.inf)


@dataclass(frozen=True, eq=False)
class EvictionPlan:
    """Scored tokens of some rows, and how many of them every head is to keep.

    Attributes
    ----------
    rows : LongTensor[R]
        On the CPU.
    tokens : Positions
    scores : Tensor[R, H_kv, N]
    ranks : Tensor[R, H_kv, N]
        The same as `ranked` returns them.
    forced : BoolTensor[R, H_kv, N]
        Tokens that stay whatever their score.
    per_head : LongTensor[R, H_kv]
        Tokens to keep, on any device.
    bounds : two of LongTensor[R, H_kv], or None
        Least and most that a guard may keep instead, on the CPU; None where it may not.
    chunk_share : float
        Share of the tokens to keep that joins the best ones to contiguous text.
    protection : RowProtection or None
        With fair eviction, tokens are chosen anew so that every span keeps its quota.
    """

    rows: torch.Tensor
    tokens: Positions
    scores: torch.Tensor
    ranks: torch.Tensor
    forced: torch.Tensor
    per_head: torch.Tensor
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None
    chunk_share: float = 0.0
    protection: RowProtection | None = None

    def known(self, count: torch.Tensor) -> torch.Tensor | None:
        """Return how many of `count` tokens `keep(per_head)` keeps, if numbers tell.

        Parameters
        ----------
        count : LongTensor[R, H_kv]
            On the CPU.

        Returns
        -------
        LongTensor[R, H_kv] or None
            On the CPU.
        """
        if self.chunk_share or self.protection is not None or not self.per_head.is_cpu:
            return None
        return torch.minimum(self.per_head, count)

    def keep(self, per_head: torch.Tensor) -> torch.Tensor:
        """Choose so many tokens of every head.

        Parameters
        ----------
        per_head : LongTensor[R, H_kv]
            On any device.

        Returns
        -------
        BoolTensor[R, H_kv, N]
        """
        valid, forced = self.tokens.valid, self.forced
        if self.chunk_share:
            keep = token2chunk(self.scores, valid, per_head, self.chunk_share, forced)
        else:
            keep = keep_top(self.ranks, per_head) & valid
        if self.protection is None:
            return keep
        return self.protection.rebalance(
            self.rows, self.tokens.positions, keep, self.scores, valid, forced
        )
