"""A layer that evicts, in a forward: when evictions run, and how a forward is undone.

Evictions run at the start of `update`, never between an attention and its logits. Until then a
rejected draft can be cropped without a trace. Two forwards cannot wait, because the memory they
need is the one to be saved: a long prompt, and several tokens at once later. They are cut right
after their attention, and only then: what they ask for decides.

What is due and what goes is for the subclasses to say. Rows are independent: a row in a padded
batch evicts at the same tokens as that row alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.layers.draft import Before, Draft
from hf_reasoncache.layers.policy import Budgets, Policy
from hf_reasoncache.precision import without_autocast
from hf_reasoncache.protection import RowProtection
from hf_reasoncache.risk import Probes, RiskLog, Shadow, eviction_damage
from hf_reasoncache.risk.guard import Select, Weigh
from hf_reasoncache.scorers.base import HeldTokens
from hf_reasoncache.storage.held_positions import AllPositions, HeldPositions
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.pool_store import PoolStore
from hf_reasoncache.storage.query_window import QueryWindow

_STATISTICS = {"mass": torch.float32, "notes": torch.int32}
_MASS_BLOCK = 64  # prompt queries per pass while attention mass is accumulated


class EvictingLayer(CacheLayer):
    """One layer that holds some of the tokens it has seen.

    Parameters
    ----------
    index : int
    policy : Policy
    store : PoolStore, optional

    Attributes
    ----------
    budgets : Budgets or None
        What every row may hold; None until the prompt is complete.
    risk : RiskLog
        What the evictions cost, if the policy has it measured.
    shadow : Shadow or None
        All tokens of the heads that are probed.
    queries : QueryWindow
        What later evictions will ask with.
    """

    _settings: dict[str, Any]

    def __init__(self, index: int, policy: Policy, store: PoolStore | None = None) -> None:
        self.policy = policy
        # Whether every token must be noted, however far the next eviction is.
        self._notes_all = policy.scorer.needs_mass or policy.probes is not None
        super().__init__(index, store)
        self.use(self.store)

    def use(self, store: PoolStore) -> None:
        """Keep tokens in another store, before there are any."""
        scorer = self.policy.scorer
        wanted = {"mass": scorer.needs_mass, "notes": scorer.keeps_notes}
        store.statistics = {name: _STATISTICS[name] for name in wanted if wanted[name]}
        self.store = store

    def _clear(self) -> None:
        super()._clear()
        self.evictions = self.evicted = 0
        self.budgets: Budgets | None = None
        self.risk = RiskLog()
        self.shadow: Shadow | None = None
        self._shadowed = False
        self.queries = QueryWindow(self.query_columns)
        self._prompt_columns = 0
        self._prompt_open = True
        self._by_token = False  # whether the first forward had a single token
        self._calm = False
        self._attended: HeldPositions | AllPositions | None = None
        self._draft: Draft | None = None

    @property
    def may_evict(self) -> bool:
        """See `CacheLayer.may_evict`."""
        return self.policy.may_evict

    @property
    def query_columns(self) -> int:
        """Newest columns whose queries an eviction needs."""
        return max(self.policy.scorer.queries, self._risk_queries)

    @property
    def _risk_queries(self) -> int:
        return 0 if self.policy.risk is None else self.policy.risk.queries

    @property
    def _scaling(self) -> float:
        scaling: float = self._settings["scaling"]
        return scaling

    # ----------------------------------------------------------------------- what subclasses decide

    @abstractmethod
    def _allocate(self) -> None:
        """Fix, or fix anew, what every row may hold, now that the prompt is in the pool."""

    @abstractmethod
    def _capacity(self, length: torch.Tensor) -> torch.Tensor:
        """LongTensor[B, H_kv]: slots for heads that hold `length` tokens."""

    @abstractmethod
    def _due(self, columns: int, steps: int) -> torch.Tensor:
        """Rows that must evict, `columns` columns being stored, before `steps` more are."""

    def _room(self) -> int:
        """Return how many more tokens make nothing due, as far as a look at the pool shows.

        0 while the prompt may grow.
        """
        return 0

    @abstractmethod
    def _evict(self, rows: torch.Tensor, columns: int) -> None:
        """Do what is due in `rows` when `columns` columns have been stored."""

    def _recount(self) -> None:
        """Take note that heads have lost tokens otherwise than by an eviction, or got them back."""

    # ---------------------------------------------------------------------------------- one forward

    def _begin(self, steps: int) -> None:
        self._attended = self._draft = None
        room = self._room()
        noted = self._notes_all or self.record_past or self.store.clock is not None
        # What an eviction will ask about is still to come, or will come at once and be kept whole.
        self._calm = steps == 1 and room > self.queries.size and not noted
        if self.store.pool is None:
            self._by_token = steps == 1
        if steps <= room or self.store.pool is None:
            return
        with without_autocast(self.device):
            self._evict_due(steps)

    def _evict_due(self, steps: int) -> None:
        """Fix the budgets if they are not yet, and evict what is due before `steps` new tokens."""
        grows = self._grows_prompt(self.seen, steps)
        complete = self._prompt_open and not grows
        if self.budgets is None:
            self._allocate()
            self._fit()
            complete = True
        if complete:
            self._check_prompt()
        if self.record_past or (steps == 1 and not grows):
            self._evict(self._due(self.seen, 1), self.seen)

    def prepare(self) -> None:
        """See `CacheLayer.prepare`; evicts where a row is due."""
        if self.policy.probes is not None:
            raise ValueError(
                "probes: expected plain decoding, got captured steps, which a shadow cannot "
                "follow; leave out decode_graphs, or the probes."
            )
        super().prepare()
        self._prompt_open = False
        self.queries.make_ring(self.seen)

    def static_parts(self) -> Iterator[Any]:
        """See `CacheLayer.static_parts`."""
        yield from super().static_parts()
        yield from self.queries.tensors()

    def advance(self) -> None:
        """See `CacheLayer.advance`."""
        super().advance()
        self.queries.count_appended()

    def _grows_prompt(self, begin: int, steps: int) -> bool:
        """Whether `steps` tokens from column `begin` on belong to the prompt."""
        length = self.policy.prompt_length
        if length is None or (steps == 1 and not self._by_token):
            # Of a prompt in chunks only the last can have a single token.
            more = steps > 1 or begin + 1 == length
        else:
            more = begin < length
        return self._prompt_open and more and not self.record_past

    @property
    def expects_prompt(self) -> bool:
        """See `CacheLayer.expects_prompt`."""
        return self._grows_prompt(self.seen, 1)

    def _end_of_prompt(self) -> int:
        return min(self.policy.prompt_length or self.seen, self.seen)

    def store_first(self, new: NewTokens) -> None:
        """See `CacheLayer.store_first`; a long prompt is cut here."""
        if self.store.shares:
            self._remember(new)
            self.store.store_first(new, self.seen, self.shard)
            self._allocate()
            self._fit()
            return
        batch, heads, steps, _ = new.keys.shape
        stored = (
            torch.full((batch,), steps, device="cpu")
            if new.valid is None
            else new.valid.sum(-1).cpu()
        )
        self.store.begin(new, self.seen)
        self.store.allocate(stored[:, None].expand(batch, heads).contiguous(), new)
        if self.record_past:
            # A draft follows the prompt and may be cropped; the next forward fixes the budgets.
            self._draft = Draft(new, self._save(deep=False), token_by_token=False)
            self._prompt_open = False
        self._store(new, self.seen)
        if not self.record_past:
            self._allocate()
            self._cut()

    def attend(self, new: NewTokens) -> torch.Tensor:
        """See `CacheLayer.attend`."""
        if self._calm:
            self.queries.clear()
            return super().attend(new)
        if self.record_past:
            return self._attend_draft(new)
        steps = new.steps
        grows = self._grows_prompt(self.seen - steps, steps)
        self._prompt_open = grows
        self._make_room(steps)
        out = self._step(new, self.seen)
        if grows and self.store.shares:
            self.store.extend_prompt(new, self.seen, self.shard)
            self._allocate()
            self._fit()
            return out
        if grows:
            self._allocate()
        if steps > 1 or grows:
            self._cut()
        return out

    def _step(self, new: NewTokens, end: int) -> torch.Tensor:
        """Append, attend and take note of tokens whose last one is column `end - 1`."""
        self._take(new, end)
        if not self.policy.scorer.needs_mass:
            return self.store.attend(new, end)
        return self.store.attend(new, end, **self._mass_arguments(new.query))

    def _take(self, new: NewTokens, end: int) -> None:
        self.store.append(new, end)
        self._remember(new)

    def _store_notes(self, held: HeldTokens, slots: torch.Tensor) -> None:
        """Keep what the scorer has noted about tokens that lie in `slots`."""
        if held.notes is None:
            return
        place, notes = slots.flatten(), held.notes.flatten()
        if held.has_filler:
            known = held.valid.flatten().nonzero()[:, 0]
            place, notes = place.index_select(0, known), notes.index_select(0, known)
        self.store.tokens.fields["notes"].index_copy_(0, place, notes)

    def _make_room(self, steps: int) -> None:
        pool = self.store.tokens
        if steps > pool.least_free:
            pool.relayout(torch.maximum(pool.capacity, pool.length + steps))

    def _fit(self) -> None:
        """Give every head exactly the slots it should have."""
        pool = self.store.tokens
        target = self._capacity(pool.length)
        if not torch.equal(target, pool.capacity):
            pool.relayout(target)

    def _store(self, new: NewTokens, end: int) -> None:
        """Append and accumulate attention; the output is already known."""
        self._take(new, end)
        if not self.policy.scorer.needs_mass:
            return
        for first in range(0, new.steps, _MASS_BLOCK):
            block = new.columns(first, first + _MASS_BLOCK)
            last = end - new.steps + first + block.steps
            self.store.attend(block, last, **self._mass_arguments(block.query))

    def _mass_arguments(self, query: torch.Tensor) -> dict[str, torch.Tensor]:
        """What makes `decode_attention` accumulate the attention mass."""
        scorer = self.policy.scorer
        mass, steps = self.store.tokens.fields["mass"], query.shape[2]
        if scorer.mass_decay == 1.0:
            return {"mass": mass}
        mass.mul_(scorer.mass_decay**steps)
        age = torch.arange(steps - 1, -1, -1, device=query.device)
        return {"mass": mass, "mass_weight": scorer.mass_decay**age}

    def _cut(self) -> None:
        """Evict what a long forward has made due."""
        pool = self.store.tokens
        rows = self._due(self.seen, 0)
        if rows.numel():
            held = pool.held()
            self._attended = HeldPositions(held.positions.clone(), held.layout, held.length)
        self._evict(rows, self.seen)
        self._fit()

    # ---------------------------------------------------------------------------------- protection

    def _protect(self) -> RowProtection | None:
        """What is protected in each row, now that the prompt has grown to its present end."""
        if self.policy.protection is None:
            return None
        prompt = (self._end_of_prompt() - self.store.first).where(self.store.first >= 0, 0)
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
        queries = self.queries.last()
        if queries is None:
            raise ValueError(f"layer {self.index}: expected queries to measure with, got none.")
        queries = queries[rows.to(queries.device), :, -self._risk_queries :]
        first = self.store.first[rows].to(queries.device)[:, None]
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

    def _remember(self, new: NewTokens) -> None:
        """Take note of what later evictions and probes will need."""
        self.queries.append(new.query, self.store.clock)
        self._settings = new.settings
        if self.policy.probes is not None:
            self._follow(new, self.policy.probes)

    def _follow(self, new: NewTokens, probes: Probes) -> None:
        if not self._shadowed:
            self._shadowed = True
            self.shadow = probes.shadow(self.index, new.keys.shape[1], self.shard)
        if self.shadow is None:
            return
        self.shadow.append(new.keys, new.values, new.valid)
        if new.steps == 1 and self.shadow.is_due():
            pool = self.store.tokens
            slots, offset = pool.slots(torch.arange(pool.length.shape[0], device="cpu"))
            columns = pool.fields["positions"][slots].long().masked_fill(offset < 0, -1)
            self.shadow.probe(new.query, columns, new.settings)

    # ------------------------------------------------------------------------ drafts and other rows

    def _save(self, *, deep: bool) -> Before:
        """Remember the state that the next forward may have to be undone to."""
        # Tensors of the state are replaced, never written to, except the pool's.
        return Before(
            store=self.store.snapshot(deep=deep),
            budgets=self.budgets,
            risk=self.risk,
            shadow=None if self.shadow is None else self.shadow.clone(),
            queries=self.queries.clone(),
            evictions=self.evictions,
            evicted=self.evicted,
        )

    def _attend_draft(self, new: NewTokens) -> torch.Tensor:
        """Attend to a draft as if its tokens came one by one, evictions between them included."""
        crosses = bool(self._due(self.seen - new.steps, new.steps).numel())
        self._draft = Draft(new, self._save(deep=crosses), token_by_token=crosses)
        if not crosses:
            self._make_room(new.steps)
            return self._step(new, self.seen)
        return torch.cat([self._step(*token) for token in self._tokens(new, self.seen)], dim=1)

    def _tokens(self, new: NewTokens, end: int) -> Iterator[tuple[NewTokens, int]]:
        """Yield single tokens and their end column, evicting what is due before each."""
        for index in range(new.steps):
            column = end - new.steps + index
            self._evict(self._due(column, 1), column)
            self._make_room(1)
            yield new.columns(index, index + 1), column + 1

    def _crop(self, columns: int) -> None:
        # Without a draft to go back to, attention mass that the removed queries gave stays.
        draft, self._draft = self._draft, None
        if draft is None or columns > draft.new.steps:
            super()._crop(columns)
            if self.shadow is not None:
                self.shadow.crop(self.seen)
            self.queries.crop(columns)
            if "notes" in self.store.statistics:
                # They may be about tokens whose positions other tokens are going to take.
                self.store.tokens.fields["notes"].zero_()
            self._prompt_columns = min(self._prompt_columns, self.seen)
            if self.budgets is not None:
                self._recount()
            return
        self.seen -= columns
        before = draft.before
        self.store, self.budgets, self.risk = before.store, before.budgets, before.risk
        self.shadow, self.queries = before.shadow, before.queries
        self.evictions, self.evicted = before.evictions, before.evicted
        accepted = draft.new.columns(0, draft.new.steps - columns)
        if draft.token_by_token:
            for token, end in self._tokens(accepted, self.seen):
                self._store(token, end)
        elif accepted.steps:
            self._make_room(accepted.steps)
            self._store(accepted, self.seen)

    def select_rows(self, rows: torch.Tensor) -> None:
        """See `CacheLayer.select_rows`."""
        super().select_rows(rows)
        if self.shadow is not None:
            self.shadow.select_rows(rows)
        self.queries.select_rows(rows)
        self.risk = self.risk.select_rows(rows)
        if self.budgets is not None:
            self.budgets = self.budgets.select_rows(rows)
        self._draft = self._attended = None

    def fork(self, rows: torch.Tensor) -> None:
        """See `CacheLayer.fork`: each copy evicts on its own, so nothing is stored once."""
        self.select_rows(rows)

    def hide(self, hidden: torch.Tensor) -> None:
        """See `CacheLayer.hide`."""
        super().hide(hidden)
        if self.shadow is not None:
            self.shadow.hide(hidden)
        if self.budgets is not None:
            self._recount()

    def activate_past_recording(self) -> None:
        """See `CacheLayer.activate_past_recording`.

        Raises
        ------
        ValueError
            If rows share their prompt: the first forward would bring a draft together with it.
        """
        if self.store.shares:
            raise ValueError(
                "assisted decoding: expected branches that keep every token, got a suffix policy; "
                "use SharedBranchCache(config) without suffix, or generate without an assistant."
            )
        super().activate_past_recording()

    def tensors(self) -> Iterator[torch.Tensor]:
        """See `CacheLayer.tensors`; queries kept for scoring and what could be undone too."""
        yield from super().tensors()
        yield from self.queries.tensors()
        if isinstance(self._attended, HeldPositions):
            yield self._attended.positions
        if self._draft is not None:
            yield from self._draft.tensors()

    def held_positions(self) -> list[list[list[int]]]:
        """See `CacheLayer.held_positions`."""
        if self._attended is None:
            return super().held_positions()
        return self.store.with_shared(self._attended.lists())
