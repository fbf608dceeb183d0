"""What an eviction is to keep, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_reasoncache.policies.token2chunk import token2chunk
from hf_reasoncache.protection import RowProtection


@dataclass(frozen=True, eq=False)
class EvictionPlan:
    """Scored tokens of some rows, and how many of them every head is to keep.

    Attributes
    ----------
    rows : LongTensor[R]
        On the CPU.
    positions : LongTensor[R, H_kv, N]
        Ascending; -1 for filler, which comes last.
    valid : BoolTensor[R, H_kv, N]
        False for filler.
    scores : Tensor[R, H_kv, N]
    forced : BoolTensor[R, H_kv, N]
        Tokens that stay whatever their score.
    per_head : LongTensor[R, H_kv]
        Tokens to keep, on any device.
    least, most : LongTensor[R, H_kv]
        Bounds within which another number may be kept; on the CPU.
    fixed : bool
        Whether every head is to keep `per_head` tokens, no more and no less.
    chunk_share : float
        Share of the tokens to keep that joins the best ones to contiguous text.
    protection : RowProtection or None
        With fair eviction, tokens are chosen anew so that every span keeps its quota.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor
    scores: torch.Tensor
    forced: torch.Tensor
    per_head: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor
    fixed: bool = False
    chunk_share: float = 0.0
    protection: RowProtection | None = None

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
        keep = token2chunk(self.scores, self.valid, per_head, self.chunk_share, self.forced)
        if self.protection is None:
            return keep
        return self.protection.rebalance(
            self.rows, self.positions, keep, self.scores, self.valid, self.forced
        )
