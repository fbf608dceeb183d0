"""A layer that knows what it must not lose, and what it costs to lose something."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hf_reasoncache.layers.aside import gathered
from hf_reasoncache.layers.chunk import Chunk
from hf_reasoncache.layers.policy import Budgets, Policy
from hf_reasoncache.layers.pooled import PooledLayer
from hf_reasoncache.layers.query_log import QueryLog
from hf_reasoncache.protection import RowProtection
from hf_reasoncache.risk import Probes, RiskLog, Shadow, eviction_damage
from hf_reasoncache.risk.guard import Select, Weigh


class WatchedLayer(PooledLayer):
    """The part of an evicting layer that protects tokens and measures evictions.

    Attributes
    ----------
    policy : Policy
    budgets : Budgets or None
        What every row may hold; None until the prompt is complete.
    risk : RiskLog
        What the evictions cost, if the policy has it measured.
    shadow : Shadow or None
        All tokens of the heads that are probed.
    """

    policy: Policy
    _settings: dict[str, Any]

    def _clear(self) -> None:
        super()._clear()
        self.budgets: Budgets | None = None
        self.risk = RiskLog()
        self.shadow: Shadow | None = None
        self._shadowed = False
        self._log = QueryLog(self.log_size)

    @property
    def may_evict(self) -> bool:
        """See `PooledLayer.may_evict`."""
        return self.policy.may_evict

    @property
    def log_size(self) -> int:
        """Newest columns whose queries an eviction needs."""
        return max(self.policy.scorer.queries, self._risk_queries)

    @property
    def _risk_queries(self) -> int:
        return 0 if self.policy.risk is None else self.policy.risk.queries

    @property
    def _scaling(self) -> float:
        scaling: float = self._settings["scaling"]
        return scaling

    @abstractmethod
    def _end_of_prompt(self) -> int:
        """Columns of the prompt so far."""

    def _recount(self) -> None:
        """Take note that heads have lost tokens otherwise than by an eviction, or got them back."""

    # -------------------------------------------------------------------------------- hidden tokens

    def hide(self, hidden: torch.Tensor) -> None:
        """See `GuardedLayer.hide`."""
        super().hide(hidden)
        if self.shadow is not None:
            self.shadow.hide(hidden)
        if self.budgets is not None:
            self._recount()

    def _evict_hidden(self, rows: torch.Tensor) -> int:
        """Let what the mask hides in some rows go, before any token that it shows.

        Returns
        -------
        int
            Tokens evicted, each row and head counted.
        """
        if self.aside is None:
            return 0
        others = torch.ones(len(self.aside.length), dtype=torch.bool, device="cpu")
        others = others.index_fill(0, rows, False)[:, None, None]
        count = int(self.aside.length[rows].sum())
        self.aside = gathered([self.aside], lambda at: others.to(at.device).expand_as(at))
        return count

    # ---------------------------------------------------------------------------------- protection

    def _protect(self) -> RowProtection | None:
        """What is protected in each row, now that the prompt has grown to its present end."""
        if self.policy.protection is None:
            return None
        prompt = (self._end_of_prompt() - self.first).where(self.first >= 0, 0)
        known = None if self.budgets is None else self.budgets.protection
        return self.policy.protection.for_rows(prompt) if known is None else known.grown(prompt)

    def _check_prompt(self) -> None:
        """Raise ValueError unless what is to be protected fits the prompt, which is complete."""
        if self.budgets is not None and self.budgets.protection is not None:
            self.budgets.protection.check()

    # ---------------------------------------------------------------------------------------- risk

    def _scale(
        self,
        rows: torch.Tensor,
        columns: int,
        positions: torch.Tensor,
        load: Callable[[str], torch.Tensor],
    ) -> Weigh:
        """Something to weigh evictions with, from all that `rows` hold.

        Parameters
        ----------
        rows : LongTensor[R]
        columns : int
            Columns stored.
        positions : LongTensor[R, H_kv, N]
            Counted from the row's first real token, -1 for filler.
        load : Callable
            Gathers "keys" `[R, H_kv, N, D]` and "values" `[R, H_kv, N, D_v]`.
        """
        queries = self._log.last()
        if queries is None:
            raise ValueError(f"layer {self.index}: expected queries to measure with, got none.")
        queries = queries[rows.to(queries.device), :, -self._risk_queries :]
        first = self.first[rows].to(queries.device)[:, None]
        asked = torch.arange(columns - queries.shape[2], columns, device=queries.device) - first
        held = (load("keys"), load("values"), positions)
        grouped = queries.unflatten(1, (positions.shape[1], -1))
        return partial(eviction_damage, grouped, asked.clamp_min(-1), *held, **self._settings)

    def _decide(
        self,
        rows: torch.Tensor,
        columns: int,
        select: Select,
        bounds: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scale: Callable[[], Weigh],
        *,
        guarded: bool = True,
    ) -> torch.Tensor:
        """Choose what stays, and take note of what that costs if the policy has it measured.

        Parameters
        ----------
        rows : LongTensor[R]
        columns : int
        select : Callable
            From tokens per head to what stays.
        bounds : three of LongTensor[R, H_kv]
            Tokens that a head is to keep, and the least and the most that a guard may give it.
        scale : Callable
            Makes what weighs choices.
        guarded : bool
            False leaves a guard out.

        Returns
        -------
        BoolTensor[R, H_kv, N]
        """
        risk = self.policy.risk
        if risk is None:
            return select(bounds[0])
        risk = risk if guarded else replace(risk, guard=None)
        keep, damage = risk.choose(select, scale(), *bounds, self.shard)
        self.risk = self.risk.add(rows, columns, damage)
        return keep

    def _remember(self, chunk: Chunk) -> None:
        """Take note of what later evictions and probes will need."""
        self._log.append(chunk.query, self.clock)
        self._settings = chunk.settings
        if self.policy.probes is not None:
            self._follow(chunk, self.policy.probes)

    def _follow(self, chunk: Chunk, probes: Probes) -> None:
        if not self._shadowed:
            self._shadowed = True
            self.shadow = probes.shadow(self.index, chunk.keys.shape[1], self.shard)
        if self.shadow is None:
            return
        self.shadow.append(chunk.keys, chunk.values, chunk.valid)
        if chunk.steps == 1 and self.shadow.is_due():
            pool = self._require_pool()
            slots, offset = pool.slots(torch.arange(pool.length.shape[0], device="cpu"))
            columns = pool.fields["positions"][slots].long().masked_fill(offset < 0, -1)
            self.shadow.probe(chunk.query, columns, chunk.settings)

    def prepare(self) -> None:
        """See `PooledLayer.prepare`."""
        if self.policy.probes is not None:
            raise ValueError(
                "probes: expected plain decoding, got captured steps, which a shadow cannot "
                "follow; leave out decode_graphs, or the probes."
            )
        super().prepare()

    def _crop(self, columns: int) -> None:
        super()._crop(columns)
        if self.shadow is not None:
            self.shadow.crop(self.seen)

    def select_rows(self, rows: torch.Tensor) -> None:
        """See `GuardedLayer.select_rows`."""
        super().select_rows(rows)
        if self.shadow is not None:
            self.shadow.select_rows(rows)
        self._log.select_rows(rows)
        self.risk = self.risk.select_rows(rows)
        if self.budgets is not None:
            self.budgets = self.budgets.select_rows(rows)
