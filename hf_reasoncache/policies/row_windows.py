"""Where the windows of each row lie, and how much of one stays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from hf_reasoncache.budgets.heads import head_budgets
from hf_reasoncache.policies.base import Counts, EvictionSpan, RowState
from hf_reasoncache.policies.plan import EvictionPlan, Positions, ranked
from hf_reasoncache.protection import RowProtection
from hf_reasoncache.shards import Shard

if TYPE_CHECKING:
    from hf_reasoncache.policies.window import WindowPolicy


@dataclass(frozen=True, eq=False)
class RowWindows(RowState):
    """The next window of every row of one layer; changes give a new object.

    Positions are counted from a row's first real token, so a row in a padded batch has the windows
    of that row alone, and rows of different length reach theirs at different steps.

    Attributes
    ----------
    policy : WindowPolicy
    first : LongTensor[B]
        Column of each row's first real token; -1 while a row has only seen padding.
    prompt : LongTensor[B]
        Position behind the prompt. No window reaches across it.
    start : LongTensor[B]
        Position where the next window begins; all before it is compressed, or protected prompt.
    sweep : LongTensor[B]
        Position up to which the compressed past has been compressed again.
    limit : LongTensor[B] or None
        Tokens per head that stay after a compaction.
    shard : Shard
        Which heads of the layer are here.
    protection : RowProtection or None
    """

    policy: WindowPolicy
    first: torch.Tensor
    prompt: torch.Tensor
    start: torch.Tensor
    sweep: torch.Tensor
    limit: torch.Tensor | None
    shard: Shard
    protection: RowProtection | None = None

    def __post_init__(self) -> None:
        # Now, because a captured step may ask for it but not compute it.
        _ = self.calm

    # --------------------------------------------------------------------------------- the windows

    @cached_property
    def end(self) -> torch.Tensor:
        """LongTensor[B]: position behind each row's next window."""
        window, phase = self.policy.window, self.policy.phase
        aligned = self.start + window - (self.start - phase) % window
        return aligned.where(self.start >= self.prompt, torch.minimum(aligned, self.prompt))

    @cached_property
    def complete_at(self) -> torch.Tensor:
        """LongTensor[B]: columns stored when a row's next window is complete."""
        complete = self.first + self.end + self.policy.recent
        return complete.where(self.first >= 0, torch.iinfo(torch.long).max)

    @cached_property
    def calm(self) -> int:
        """Columns up to which no window becomes complete; a number, as every step asks for it."""
        return int(self.complete_at.min())

    def open_columns(self, columns: int) -> int:
        """Columns since the beginning of the earliest next window."""
        return max(0, columns - int((self.first + self.start).min()))

    def kept(self, rows: torch.Tensor) -> torch.Tensor:
        """LongTensor[R]: tokens per head that stay of each row's next window.

        A window that the end of the prompt cuts short keeps its share: rounding down the running
        total instead of each part makes the parts of a window add up to the whole.
        """
        start, end = self.start[rows], self.end[rows]
        in_prompt = start < self.prompt[rows]
        share = torch.full_like(start, self.policy.prompt_kept).where(in_prompt, self.policy.kept)
        kept = end * share // self.policy.window - start * share // self.policy.window
        if self.protection is None or self.protection.settings.keep is None:
            return kept
        return self._with_whitelist(self.protection)[rows].where(in_prompt, kept)

    def _with_whitelist(self, protection: RowProtection) -> torch.Tensor:
        """LongTensor[B]: tokens that stay of a next window that is in the prompt.

        The whitelist comes first, wherever it lies; all other tokens of the prompt share what the
        prompt may keep beyond it.
        """
        listed = [protection.count_below(at) for at in (self.start, self.end, self.prompt)]
        start, end, free = self.start - listed[0], self.end - listed[1], self.prompt - listed[2]
        rest, free = (self.prompt_kept - listed[2]).clamp_min(0), free.clamp_min(1)
        return listed[1] - listed[0] + end * rest // free - start * rest // free

    @property
    def prompt_kept(self) -> torch.Tensor:
        """LongTensor[B]: tokens per head that stay of a prompt that is not protected as a whole."""
        return self.prompt * self.policy.prompt_kept // self.policy.window

    def check_prompt(self) -> None:
        """See `RowState.check_prompt`; a whitelist is no more than may stay of the prompt."""
        if self.protection is None:
            return
        self.protection.check()
        if self.protection.settings.keep is None:
            return
        rows = zip(self.prompt.tolist(), self.protection.count.tolist(), strict=True)
        for row, (prompt, listed) in enumerate(rows):
            self.policy.require_whitelist(prompt, listed, row)

    # --------------------------------------------------------------------------------- what is due

    def room(self, counts: Counts, columns: int) -> int:
        """See `RowState.room`."""
        return self.calm - columns

    def due(self, counts: Counts, columns: int, q_len: int) -> torch.Tensor:
        """See `RowState.due`: rows whose next window is complete before the last of the tokens."""
        return (self.complete_at < columns + q_len).nonzero()[:, 0]

    def next_span(
        self, rows: torch.Tensor, columns: int, counts: Counts
    ) -> tuple[RowWindows, EvictionSpan | None]:
        """See `RowState.next_span`.

        First every complete window, as its own queries see it; then, where a row holds more than
        its bound, the oldest windows again, as the newest queries see them.
        """
        state, complete = self, self._complete(rows, columns)
        while complete.numel():
            low, high, kept = state.start[complete], state.end[complete], state.kept(complete)
            state = replace(state, start=state.start.index_put((complete,), high))
            if bool((kept < high - low).any()):
                first = state.first[complete]
                # Scored as if the text ended behind the window.
                prompt = state.prompt[complete]
                span = EvictionSpan(complete, columns, first, high, low, high, kept, prompt)
                return state, span
            complete = state._complete(rows, columns)
        over = state._over_bound(rows, counts)
        if not over.numel():
            return state, None
        low, high = state._oldest(over)
        state = replace(state, sweep=state.sweep.index_put((over,), high))
        first = state.first[over]
        seen, prompt = columns - first, state.prompt[over]
        return state, EvictionSpan(over, columns, first, seen, low, high, prompt=prompt)

    def _complete(self, rows: torch.Tensor, columns: int) -> torch.Tensor:
        return rows[self.complete_at[rows] <= columns]

    def _over_bound(self, rows: torch.Tensor, counts: Counts) -> torch.Tensor:
        """Rows that hold more than their bound in what no longer is in a window to come."""
        if self.limit is None:
            return rows[:0]
        held = counts.before(rows, self.first[rows] + self.start[rows])
        if self.policy.keeps_unevenly:
            held = self.shard.gather(held)
        allowed = (self.limit[rows] - self.policy.recent) * held.shape[1]
        return rows[held.sum(-1) > allowed]

    def _oldest(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the oldest windows, positions from and to, that were not compressed again yet.

        They hold about as many tokens as a new window. When all the past has had its turn, it
        begins again with the oldest.
        """
        oldest = self.prompt[rows] if self.policy.protect_prompt else torch.zeros_like(rows)
        low = self.sweep[rows].where(self.sweep[rows] < self.start[rows], oldest)
        span = self.policy.window * max(1, round(self.policy.window / max(self.policy.kept, 1)))
        return low, torch.minimum(low + span, self.start[rows])

    # ----------------------------------------------------------------------------- how much stays

    def quota(self, span: EvictionSpan, count: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
        """See `RowState.quota`: the window's share, or of older windows as much of what is left."""
        if span.kept is not None:
            return span.kept[:, None].expand_as(count)
        # At least one less than there are, so that the bound is reached.
        kept = min(self.policy.kept, self.policy.window - 1)
        return forced + (count - forced) * kept // self.policy.window

    def expected(self, span: EvictionSpan, counts: Counts) -> torch.Tensor:
        """See `RowState.expected`: a new window is whole; what is left of older ones is taken to
        lie evenly in the past.
        """
        rows = span.rows
        low, high = span.low, span.high
        if low is None or high is None:
            return counts.length[rows]
        size = (high - low)[:, None]
        if span.kept is not None:
            return size.expand(-1, counts.length.shape[1])
        start, pinned = self.start[rows, None], torch.zeros_like(size)
        oldest = pinned
        if self.policy.protect_prompt:
            # A protected prompt is in no window.
            oldest = self.prompt[rows, None]
            pinned = counts.before(rows, self.first[rows] + self.prompt[rows])
        past = counts.before(rows, self.first[rows] + self.start[rows])
        found = (past - pinned) * size / (start - oldest)
        return found.round().long().clamp_min(1)

    def plan(
        self, span: EvictionSpan, tokens: Positions, scores: torch.Tensor
    ) -> tuple[RowWindows, EvictionPlan]:
        """See `RowState.plan`.

        A guard may keep three quarters of what a new window would lose, and nothing of older ones.
        """
        forced = torch.zeros_like(tokens.valid)
        if self.protection is not None:
            forced = self.protection.covers(span.rows, tokens.positions) & tokens.valid
        ranks = ranked(tokens, scores, forced)
        if self.policy.head_budgets and span.kept is not None:
            per_head = self._by_demand(span.kept, tokens, ranks, forced)
        else:
            per_head = self.quota(span, tokens.count, forced.sum(-1))
        bounds = None
        if span.kept is not None and self.policy.guarded:
            kept = per_head.cpu()
            spare = (tokens.count.cpu() - kept).clamp_min(0) * 3 // 4
            bounds = forced.sum(-1).cpu(), kept + spare
        plan = EvictionPlan(
            rows=span.rows,
            tokens=tokens,
            scores=scores,
            ranks=ranks,
            forced=forced,
            per_head=per_head,
            bounds=bounds,
            chunk_share=self.policy.chunk_share,
            protection=self.protection,
        )
        return self, plan

    def _by_demand(
        self, kept: torch.Tensor, tokens: Positions, ranks: torch.Tensor, forced: torch.Tensor
    ) -> torch.Tensor:
        """Give heads by demand as many tokens as if every one kept `kept`, LongTensor[R].

        Only for a window that has not lost a token yet, so that all heads of a row hold the same.
        """
        count, floor = tokens.count.amin(-1).tolist(), forced.sum(-1).amax(-1).tolist()
        everyone = self.shard.gather(ranks)
        split = [
            # No head can keep more than it holds.
            head_budgets(
                everyone[row : row + 1],
                everyone[row : row + 1] > -torch.inf,
                everyone.shape[1] * each,
                floor=floor[row],
                high=max(1.0, min(2.0, count[row] / max(each, 1))),
                comparable=self.policy.scorer.comparable,
            )
            for row, each in enumerate(kept.tolist())
        ]
        return self.shard.own(torch.cat(split), ranks.shape[1])

    # -------------------------------------------------------------------------------------- slots

    def capacity(self, length: torch.Tensor, columns: int) -> torch.Tensor:
        """See `RowState.capacity`: room until a row's next window is complete, and some to grow.

        Rounded up: few different capacities keep heads of similar length in one attention call.
        """
        need = self._until_compaction(length, columns) + self.policy.spare(int(length.max()))
        roomy = self.policy.rounded(need)
        if self.limit is None:
            return roomy
        bound = (self.limit + self.policy.window)[:, None].expand_as(need)
        # What a bounded head will need in the end it gets at once, and never has to move.
        return bound.where(need <= bound, roomy)

    def _until_compaction(self, length: torch.Tensor, columns: int) -> torch.Tensor:
        """Tokens that heads with `length` of `columns` columns hold when a window is complete."""
        most = self.policy.window + self.policy.recent
        return length + (self.complete_at - columns).clamp(0, most)[:, None]

    def fitted(self, counts: Counts, columns: int) -> torch.Tensor | None:
        """See `RowState.fitted`: they do not where one lacks room until its next window is
        complete, or much is unused.

        All heads get their spare room then: the pool moves as seldom for many rows as for one.
        """
        target = self.capacity(counts.length, columns)
        lacks = bool((self._until_compaction(counts.length, columns) > counts.capacity).any())
        wastes = 4 * int(counts.capacity.sum()) > 5 * int(target.sum())
        return target if lacks or wastes else None

    # ---------------------------------------------------------------------------- drafts and rows

    def crop(self, columns: int) -> RowWindows:
        """See `RowState.crop`: what comes next begins a window there."""
        length = (columns - self.first).where(self.first >= 0, 0)
        moved = (torch.minimum(x, length) for x in (self.prompt, self.start, self.sweep))
        prompt, start, sweep = moved
        return replace(self, prompt=prompt, start=start, sweep=sweep)

    def select_rows(self, rows: torch.Tensor) -> RowWindows:
        """See `RowState.select_rows`."""
        return replace(
            self,
            first=self.first[rows],
            prompt=self.prompt[rows],
            start=self.start[rows],
            sweep=self.sweep[rows],
            limit=None if self.limit is None else self.limit[rows],
            protection=None if self.protection is None else self.protection.select_rows(rows),
        )
