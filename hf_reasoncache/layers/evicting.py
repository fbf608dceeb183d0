"""A layer that evicts, in a forward: when evictions come, and how a forward is undone.

A row that is due is served at the start of the next `update`, never between an attention and its
logits. Until then a rejected draft can be cropped without a trace. Two forwards cannot wait,
because the memory they need is the one to be saved: a long prompt, and a chunk of several tokens
later. They are cut right after their attention, and only then: what they ask for decides.

What is due and what goes is for the subclasses to say. Rows are independent: a row in a padded
batch evicts at the same tokens as that row alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from hf_reasoncache.layers.chunk import Chunk
from hf_reasoncache.layers.draft import Draft
from hf_reasoncache.layers.held_positions import AllPositions, HeldPositions
from hf_reasoncache.layers.policy import Policy
from hf_reasoncache.layers.pool import RaggedPool
from hf_reasoncache.layers.watched import WatchedLayer
from hf_reasoncache.scorers.base import HeldTokens

_STATISTICS = {"mass": torch.float32, "notes": torch.int32}
_MASS_BLOCK = 64  # prompt queries per pass while attention mass is accumulated


class EvictingLayer(WatchedLayer):
    """One layer that holds some of the tokens it has seen."""

    _STATE = ("aside", "budgets", "evictions", "evicted", "risk", "_tail")

    def __init__(self, index: int, policy: Policy) -> None:
        scorer = policy.scorer
        wanted = {"mass": scorer.needs_mass, "notes": scorer.keeps_notes}
        self.statistics = {name: _STATISTICS[name] for name in wanted if wanted[name]}
        self.policy = policy
        # Whether every token must be noted, however far the next eviction is.
        self._notes_all = scorer.needs_mass or policy.probes is not None
        super().__init__(index)

    def _clear(self) -> None:
        super()._clear()
        self.evictions = self.evicted = 0
        self._prompt_columns = 0
        self._prompt_open = True
        self._by_token = False  # whether the first forward had a single token
        self._calm = False
        self._attended: HeldPositions | AllPositions | None = None
        self._draft: Draft | None = None

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

    # ---------------------------------------------------------------------------------- one forward

    def _begin(self, steps: int) -> None:
        self._attended = self._draft = None
        room = self._room()
        noted = self._notes_all or self.record_past or self.clock is not None
        # What an eviction will ask about is still to come, or will come at once and be kept whole.
        self._calm = steps == 1 and room > self._log.size and not noted
        if self.pool is None:
            self._by_token = steps == 1
        if steps <= room or self.pool is None:
            return
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
        """See `PooledLayer.prepare`; evicts where a row is due."""
        super().prepare()
        self._prompt_open = False
        self._log.make_ring(self.seen)

    def static_parts(self) -> Iterator[Any]:
        """See `PooledLayer.static_parts`."""
        yield from super().static_parts()
        yield from self._log.tensors()

    def advance(self) -> None:
        """See `PooledLayer.advance`."""
        super().advance()
        self._log.count_appended()

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
        """See `PooledLayer.expects_prompt`."""
        return self._grows_prompt(self.seen, 1)

    def _end_of_prompt(self) -> int:
        return min(self.policy.prompt_length or self.seen, self.seen)

    def store_first(self, chunk: Chunk) -> None:
        """See `GuardedLayer.store_first`; a long prompt is cut here."""
        batch, heads, steps, _ = chunk.keys.shape
        self.first = torch.full((batch,), -1, device="cpu")
        stored = (
            torch.full((batch,), steps, device="cpu")
            if chunk.valid is None
            else chunk.valid.sum(-1).cpu()
        )
        room = stored[:, None].expand(batch, heads).contiguous()
        self.pool = RaggedPool(room, chunk.keys, chunk.values, self.statistics)
        if self.record_past:
            # A draft follows the prompt and may be cropped; the next forward fixes the budgets.
            self._draft = Draft(chunk, self._save(deep=False), token_by_token=False)
            self._prompt_open = False
        self._store(chunk, self.seen)
        if not self.record_past:
            self._allocate()
            self._cut()

    def attend(self, chunk: Chunk) -> torch.Tensor:
        """See `GuardedLayer.attend`."""
        if self._calm:
            self._log.clear()
            return super().attend(chunk)
        if self.record_past:
            return self._attend_draft(chunk)
        steps = chunk.steps
        grows = self._grows_prompt(self.seen - steps, steps)
        self._prompt_open = grows
        self._make_room(steps)
        out = self._step(chunk, self.seen)
        if grows:
            self._allocate()
        if steps > 1 or grows:
            self._cut()
        return out

    def _step(self, chunk: Chunk, end: int) -> torch.Tensor:
        """Append, attend and take note of tokens whose last one is column `end - 1`."""
        self._take(chunk, end)
        if not self.policy.scorer.needs_mass:
            return self._attend(chunk, end)
        return self._attend(chunk, end, **self._mass_arguments(chunk.query))

    def _take(self, chunk: Chunk, end: int) -> None:
        self._append(chunk, end)
        self._remember(chunk)

    def _store_notes(self, held: HeldTokens, slots: torch.Tensor) -> None:
        """Keep what the scorer has noted about tokens that lie in `slots`."""
        if held.notes is None:
            return
        place, notes = slots.flatten(), held.notes.flatten()
        if held.has_filler:
            known = held.valid.flatten().nonzero()[:, 0]
            place, notes = place.index_select(0, known), notes.index_select(0, known)
        self._require_pool().fields["notes"].index_copy_(0, place, notes)

    def _make_room(self, steps: int) -> None:
        pool = self._require_pool()
        if steps > pool.least_free:
            pool.relayout(torch.maximum(pool.capacity, pool.length + steps))

    def _fit(self) -> None:
        """Give every head exactly the slots it should have."""
        pool = self._require_pool()
        target = self._capacity(pool.length)
        if not torch.equal(target, pool.capacity):
            pool.relayout(target)

    def _store(self, chunk: Chunk, end: int) -> None:
        """`_step` without the attention's result, for tokens whose result is known already."""
        self._take(chunk, end)
        if not self.policy.scorer.needs_mass:
            return
        for first in range(0, chunk.steps, _MASS_BLOCK):
            block = chunk.columns(first, first + _MASS_BLOCK)
            last = end - chunk.steps + first + block.steps
            self._attend(block, last, **self._mass_arguments(block.query))

    def _mass_arguments(self, query: torch.Tensor) -> dict[str, torch.Tensor]:
        """What makes `decode_attention` accumulate the attention mass."""
        scorer = self.policy.scorer
        mass, steps = self._require_pool().fields["mass"], query.shape[2]
        if scorer.mass_decay == 1.0:
            return {"mass": mass}
        mass.mul_(scorer.mass_decay**steps)
        age = torch.arange(steps - 1, -1, -1, device=query.device)
        return {"mass": mass, "mass_weight": scorer.mass_decay**age}

    def _cut(self) -> None:
        """Evict what a long forward has made due."""
        pool = self._require_pool()
        rows = self._due(self.seen, 0)
        if rows.numel():
            held = pool.held()
            self._attended = HeldPositions(held.positions.clone(), held.layout, held.length)
        self._evict(rows, self.seen)
        self._fit()

    # ------------------------------------------------------------------------ drafts and other rows

    def _save(self, *, deep: bool) -> dict[str, Any]:
        """Remember the state that the next forward may have to be undone to."""
        # Tensors of the state are replaced, never written to, except the pool's.
        state = {name: getattr(self, name) for name in self._STATE}
        state["shadow"] = None if self.shadow is None else self.shadow.clone()
        return state | {"pool": self._require_pool().snapshot(deep=deep), "_log": self._log.clone()}

    def _attend_draft(self, chunk: Chunk) -> torch.Tensor:
        """Attend to a draft as if its tokens came one by one, evictions between them included."""
        crosses = bool(self._due(self.seen - chunk.steps, chunk.steps).numel())
        self._draft = Draft(chunk, self._save(deep=crosses), token_by_token=crosses)
        if not crosses:
            self._make_room(chunk.steps)
            return self._step(chunk, self.seen)
        return torch.cat([self._step(*token) for token in self._tokens(chunk, self.seen)], dim=1)

    def _tokens(self, chunk: Chunk, end: int) -> Iterator[tuple[Chunk, int]]:
        """Yield single tokens and their end column, evicting what is due before each."""
        for index in range(chunk.steps):
            column = end - chunk.steps + index
            self._evict(self._due(column, 1), column)
            self._make_room(1)
            yield chunk.columns(index, index + 1), column + 1

    def _crop(self, columns: int) -> None:
        # Without a draft to go back to, attention mass that the removed queries gave stays.
        draft, self._draft = self._draft, None
        if draft is None or columns > draft.chunk.steps:
            super()._crop(columns)
            self._log.crop(columns)
            if "notes" in self.statistics:
                # They may be about tokens whose positions other tokens are going to take.
                self._require_pool().fields["notes"].zero_()
            self._prompt_columns = min(self._prompt_columns, self.seen)
            if self.budgets is not None:
                self._recount()
            return
        self.seen -= columns
        for name, value in draft.state.items():
            setattr(self, name, value)
        accepted = draft.chunk.columns(0, draft.chunk.steps - columns)
        if draft.token_by_token:
            for token, end in self._tokens(accepted, self.seen):
                self._store(token, end)
        elif accepted.steps:
            self._make_room(accepted.steps)
            self._store(accepted, self.seen)

    def select_rows(self, rows: torch.Tensor) -> None:
        """See `GuardedLayer.select_rows`."""
        super().select_rows(rows)
        self._draft = self._attended = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """See `PooledLayer.tensors`; queries kept for scoring and what could be undone too."""
        yield from super().tensors()
        yield from self._log.tensors()
        if isinstance(self._attended, HeldPositions):
            yield self._attended.positions
        if self._draft is not None:
            yield from self._draft.tensors()

    def held_positions(self) -> list[list[list[int]]]:
        """See `PooledLayer.held_positions`."""
        return super().held_positions() if self._attended is None else self._attended.lists()
