"""The new tokens of one forward, as the attention function hands them to a layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class NewTokens:
    """New tokens of one layer.

    Attributes
    ----------
    query : Tensor[B, H_q, A, D]
        Of the newest `A` tokens: of all, except in a first forward whose other queries nobody asks
        for, see `CacheLayer.first_queries`.
    keys, values : Tensor[B, H_kv, T, D], Tensor[B, H_kv, T, D_v]
    valid : BoolTensor[B, T] or None
        False for padding; None when nothing is padded.
    settings : dict
        `scaling`, `softcap`, `s_aux` of the attention; see `triton_ops.decode_attention`.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor | None
    settings: dict[str, Any]

    @property
    def q_len(self) -> int:
        """Number of columns."""
        return self.keys.shape[2]

    def real_tokens(self) -> torch.Tensor:
        """BoolTensor[B, H_kv, T]: False for padding; a new tensor."""
        batch, heads, q_len, _ = self.keys.shape
        if self.valid is None:
            return torch.ones(batch, heads, q_len, dtype=torch.bool, device=self.keys.device)
        return self.valid[:, None].repeat(1, heads, 1)

    def columns(self, first: int, last: int) -> NewTokens:
        """Return the tokens in columns `first` to `last - 1`."""
        return replace(
            self,
            query=self.query[:, :, first:last],
            keys=self.keys[:, :, first:last],
            values=self.values[:, :, first:last],
            valid=None if self.valid is None else self.valid[:, first:last],
        )
