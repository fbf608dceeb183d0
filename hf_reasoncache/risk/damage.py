"""The damage of an eviction: how far it moves the output of each head, for the queries known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Logits held at once (4 MB in float32).
_TILE = 1 << 20


@dataclass(frozen=True, eq=False)
class Damage:
    """What an eviction does to the output of each head.

    With `A_full` the output over all tokens held, `A_kept` over those that stay, `A_evicted` over
    those that go, and `delta` the attention mass that goes,

        A_kept - A_full = delta * (A_kept - A_evicted)

    exactly, hence the error is at most `delta` times the diameter of the values.

    Attributes
    ----------
    mass : Tensor[R, H]
        `delta`, on average over queries and query group, in [0, 1].
    error : Tensor[R, H]
        `||A_kept - A_full|| / ||A_full||`, both norms over all queries and the group.
    worst : Tensor[R, H]
        The same of the single query head and query where it is largest.
    """

    mass: torch.Tensor
    error: torch.Tensor
    worst: torch.Tensor


def eviction_damage(
    queries: torch.Tensor,
    query_positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_positions: torch.Tensor,
    keeps: Sequence[torch.Tensor],
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> list[Damage]:
    """Measure the damage of evictions, each as if it were the only one.

    Parameters
    ----------
    queries : Tensor[R, H, G, A, D]
        Post-RoPE queries, grouped by the KV head they read.
    query_positions : LongTensor[R, A]
        A query sees keys at its own position and before; -1 for a query that there is not.
    keys, values : Tensor[R, H, N, D], Tensor[R, H, N, D_v]
        All tokens held.
    key_positions : LongTensor[R, H, N]
        -1 for filler.
    keeps : sequence of BoolTensor[R, H, N]
        What stays; every query must still see a token.
    scaling, softcap, s_aux
        As for `triton_ops.decode_attention`.

    Returns
    -------
    list of Damage
        One for each of `keeps`, float32 (float64 for float64 keys).
    """
    rows, heads, group, asked, _ = queries.shape
    sinks = None if s_aux is None else s_aux.view(heads, group)
    some = max(1, _TILE // max(1, rows * group * asked * keys.shape[2]))
    parts = []
    for first in range(0, heads, some):
        own = slice(first, first + some)
        attention = _Attention(
            queries[:, own],
            query_positions,
            keys[:, own],
            values[:, own],
            key_positions[:, own],
            scaling,
            softcap,
            None if sinks is None else sinks[own],
        )
        parts.append([attention.damage(keep[:, own]) for keep in keeps])
    return [
        Damage(*(torch.cat([getattr(part, name) for part in of_keep], 1) for name in _FIELDS))
        for of_keep in zip(*parts, strict=True)
    ]


_FIELDS = ("mass", "error", "worst")


@dataclass(frozen=True, eq=False)
class DamageScale:
    """Attention of the newest queries to all that some rows hold, to weigh evictions with.

    Attributes
    ----------
    queries, query_positions, keys, values, key_positions
        See `eviction_damage`.
    settings : dict
        `scaling`, `softcap`, `s_aux`.
    place : LongTensor[R, H, M] or None
        Where each token that may go lies among all tokens, -1 for filler; None where all may.
    """

    queries: torch.Tensor
    query_positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    key_positions: torch.Tensor
    settings: Mapping[str, Any]
    place: torch.Tensor | None = None

    def measure(self, keeps: Sequence[torch.Tensor]) -> list[Damage]:
        """Measure choices among the tokens that may go, BoolTensor[R, H, M]; all others stay."""
        return eviction_damage(
            self.queries,
            self.query_positions,
            self.keys,
            self.values,
            self.key_positions,
            [self._of_all(keep) for keep in keeps],
            **self.settings,
        )

    def _of_all(self, keep: torch.Tensor) -> torch.Tensor:
        if self.place is None:
            return keep
        stays = self.key_positions >= 0
        row, head, index = (~keep & (self.place >= 0)).nonzero(as_tuple=True)
        stays[row, head, self.place[row, head, index]] = False
        return stays


class _Attention:
    """Attention of some queries to some heads, over all tokens or some."""

    def __init__(
        self,
        queries: torch.Tensor,
        query_positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        key_positions: torch.Tensor,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        dtype = torch.promote_types(keys.dtype, torch.float32)
        self.present = (query_positions >= 0)[:, None, None, :]
        used = (queries.to(dtype) * scaling).where(self.present[..., None], 0.0)
        logits = used.flatten(2, 3) @ keys.to(dtype).mT
        self.logits = logits.unflatten(2, queries.shape[2:4])
        if softcap is not None:
            self.logits = softcap * (self.logits / softcap).tanh()
        at, asked = key_positions[:, :, None, None, :], query_positions[:, None, None, :, None]
        self.seen = (at >= 0) & (at <= asked)
        self.sinks = None if sinks is None else sinks.to(dtype)[None, :, :, None, None]
        self.values = values.to(dtype)
        self.weights = self._weights(self.seen)
        self.output = self._output(self.weights)

    def _weights(self, visible: torch.Tensor) -> torch.Tensor:
        logits = self.logits.masked_fill(~visible, torch.finfo(self.logits.dtype).min)
        if self.sinks is None:
            return logits.softmax(-1) * visible
        sinks = self.sinks.expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1] * visible

    def _output(self, weights: torch.Tensor) -> torch.Tensor:
        return (weights.flatten(2, 3) @ self.values).unflatten(2, weights.shape[2:4])

    def damage(self, keep: torch.Tensor) -> Damage:
        stays = keep[:, :, None, None, :]
        # A difference of weights, not of outputs: exact where nothing that matters goes.
        error = self._output(self._weights(self.seen & stays) - self.weights).norm(dim=-1)
        lost = self.weights.masked_fill(stays, 0.0).sum(-1)
        error, lost = error * self.present, lost * self.present
        norm = self.output.norm(dim=-1) * self.present
        tiny = torch.finfo(norm.dtype).tiny
        asked = self.present.expand_as(lost).flatten(2).sum(-1).clamp_min(1)
        return Damage(
            mass=lost.flatten(2).sum(-1) / asked,
            error=error.flatten(2).norm(dim=-1) / norm.flatten(2).norm(dim=-1).clamp_min(tiny),
            worst=(error / norm.clamp_min(tiny)).flatten(2).amax(-1),
        )
