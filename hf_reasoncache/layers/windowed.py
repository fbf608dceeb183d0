"""A layer that compresses each window of generated text once, when it has been written."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_reasoncache.layers.allot import Allot, by_demand, equal
from hf_reasoncache.layers.evicting import EvictingLayer
from hf_reasoncache.layers.selection import EvictionContext, gather_held
from hf_reasoncache.layers.token2chunk import token2chunk
from hf_reasoncache.layers.window_policy import WindowPolicy
from hf_reasoncache.layers.windows import RowWindows
from hf_reasoncache.risk.guard import Weigh
from hf_reasoncache.scorers.base import HeldTokens
from hf_reasoncache.storage.new_tokens import NewTokens

_NO_ROWS = torch.zeros(0, dtype=torch.long, device="cpu")


class WindowedLayer(EvictingLayer):
    """One layer that holds the prompt, a share of every window, and the newest tokens.

    Invariants between two forwards: all tokens from a row's next window on are held; of the windows
    before it each head holds what `RowWindows.kept` said, or less after a second pass; with a
    bound, no row held more than that per head when its last compaction ended.
    """

    policy: WindowPolicy
    budgets: RowWindows | None

    @property
    def query_columns(self) -> int:
        """Columns that lie between now and the oldest query that a complete window needs."""
        wanted = min(self.policy.scorer.queries, self.policy.window)
        return max(wanted + self.policy.recent if wanted else 0, self._risk_queries)

    def _remember(self, new: NewTokens) -> None:
        if self.budgets is not None and not self.budgets.placed:
            self.budgets = replace(self.budgets, first=self.store.first)
        if new.steps > 1 and self.query_columns:
            # It may bring several windows at once, whose queries are needed until they are served.
            self.queries.resize(max(self.query_columns, self._open_columns()))
        super()._remember(new)

    def _open_columns(self) -> int:
        if self.budgets is not None:
            return self.budgets.open_columns(self.seen)
        return 0 if self.policy.protect_prompt else self.seen

    def _require_windows(self) -> RowWindows:
        if self.budgets is None:
            raise ValueError(f"layer {self.index}: expected windows, got a layer without a prompt.")
        return self.budgets

    # ---------------------------------------------------------------------- what EvictingLayer asks

    def _allocate(self) -> None:
        self._prompt_columns = self._end_of_prompt()
        self.budgets = RowWindows.after_prompt(
            self.policy, self.store.first, self._prompt_columns, self.budgets, self._protect()
        )
        if self.store.shares and self.budgets.limit is not None:
            # What branches share counts against the bound of each.
            self.budgets = replace(self.budgets, limit=self.budgets.limit - self.store.elsewhere)

    def _check_prompt(self) -> None:
        super()._check_prompt()
        self._require_windows().check_whitelist()

    def _capacity(self, length: torch.Tensor) -> torch.Tensor:
        """See `EvictingLayer._capacity`."""
        return self._capacity_at(self.seen, length)

    def _capacity_at(self, columns: int, length: torch.Tensor) -> torch.Tensor:
        """Room until a row's next window is complete, and some for what stays of later ones.

        Rounded up: few different capacities keep heads of similar length in one attention call.
        """
        need = self._until_compaction(columns, length) + self.policy.spare(int(length.max()))
        roomy = self.policy.rounded(need)
        if self.budgets is not None and self.budgets.limit is not None:
            bound = (self.budgets.limit + self.policy.window)[:, None].expand_as(need)
            # What a bounded head will need in the end it gets at once, and never has to move.
            roomy = bound.where(need <= bound, roomy)
        return roomy

    def _until_compaction(self, columns: int, length: torch.Tensor) -> torch.Tensor:
        """Tokens that heads with `length` of `columns` columns hold when a window is complete."""
        most = self.policy.window + self.policy.recent
        if self.budgets is None:
            return length + most
        return length + (self.budgets.complete_at - columns).clamp(0, most)[:, None]

    def _make_room(self, steps: int) -> None:
        pool = self.store.tokens
        if steps > pool.least_free:
            pool.relayout(torch.maximum(pool.capacity, self._capacity(pool.length + steps)))

    def _fit(self) -> None:
        self._fit_at(self.seen)

    def _fit_at(self, columns: int) -> None:
        """Move the pool if a head lacks room until its next window is complete, or much is unused.

        All heads get their spare room then: the pool moves as seldom for many rows as for one.
        """
        pool = self.store.tokens
        target = self._capacity_at(columns, pool.length)
        if bool((self._until_compaction(columns, pool.length) > pool.capacity).any()) or (
            4 * pool.layout.slots > 5 * int(target.sum())
        ):
            pool.relayout(target)

    def _due(self, columns: int, steps: int) -> torch.Tensor:
        """Rows whose next window is complete before the last of `steps` more tokens."""
        windows = self._require_windows()
        if columns + steps <= windows.calm:
            return _NO_ROWS
        return (windows.complete_at < columns + steps).nonzero()[:, 0]

    def _evict(self, rows: torch.Tensor, columns: int) -> None:
        """Compress every window of `rows` that is complete."""
        if not rows.numel():
            return
        served = rows = self._complete(rows, columns)
        while rows.numel():
            self._compress(rows, columns)
            rows = self._complete(rows, columns)
        if not served.numel():
            return
        self._hold_bound(served, columns)
        self.queries.resize(self.query_columns)
        self.store.forget_order()
        self._fit_at(columns)

    def _crop(self, columns: int) -> None:
        super()._crop(columns)
        if self.budgets is not None:
            self.budgets = self.budgets.crop(self.seen)

    # ---------------------------------------------------------------------------------- compression

    def _complete(self, rows: torch.Tensor, columns: int) -> torch.Tensor:
        return rows[self._require_windows().complete_at[rows] <= columns]

    def _compress(self, rows: torch.Tensor, columns: int) -> None:
        """Compress the next window of each of `rows`, as its own queries see it."""
        windows = self._require_windows()
        low, high, kept = windows.start[rows], windows.end[rows], windows.kept(rows)
        self.budgets = windows.advance(rows)
        if bool((kept < high - low).any()):
            allot = (
                by_demand(self.policy, kept, self.shard)
                if self.policy.head_budgets
                else equal(kept)
            )
            self._shrink(rows, columns, low, high, high, allot, relent=True)

    def _hold_bound(self, rows: torch.Tensor, columns: int) -> None:
        """Compress the oldest windows of `rows` again, as the newest queries see them."""

        def again(held: HeldTokens, scores: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
            # At least one less than there are, so that the bound is reached.
            kept, listed = min(self.policy.kept, self.policy.window - 1), forced.sum(-1)
            return listed + (held.count - listed) * kept // self.policy.window

        rows = self._over_bound(rows)
        while rows.numel():
            windows = self._require_windows()
            low, high = windows.stretch(rows)
            self.budgets = windows.sweep_to(rows, high)
            now = columns - self.store.first[rows]
            self._shrink(rows, columns, low, high, now, again, relent=False)
            rows = self._over_bound(rows)

    def _over_bound(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows that hold more than their bound in what no longer is in a window to come."""
        windows, pool = self._require_windows(), self.store.tokens
        if windows.limit is None:
            return _NO_ROWS
        slots, offset = pool.slots(rows)
        begin = (self.store.first[rows] + windows.start[rows]).to(slots.device)
        past = (pool.take("positions", slots) < begin[:, None, None]) & (offset >= 0)
        held = past.sum(-1).cpu()
        if self.policy.keeps_unevenly:
            held = self.shard.gather(held)
        allowed = (windows.limit[rows] - self.policy.recent) * held.shape[1]
        return rows[held.sum(-1) > allowed]

    def _shrink(
        self,
        rows: torch.Tensor,
        columns: int,
        low: torch.Tensor,
        high: torch.Tensor,
        now: torch.Tensor,
        allot: Allot,
        *,
        relent: bool,
    ) -> None:
        """Evict from the tokens at positions `low` to `high - 1`, scored as of position `now`.

        With `relent`, a guard may keep more than `allot` says.
        """
        self.evicted += self.store.evict_hidden(rows)
        pool, first = self.store.tokens, self.store.first[rows]
        where = (self._scaling, self.index, self.shard.first)
        occasion = EvictionContext(rows, first, columns, None, *where)
        held, slots, offset, _ = gather_held(pool, occasion, (first + low, first + high))
        if not held.keys.shape[2]:
            return
        queries, asked = self._queries(rows, columns, low, now, pool.length.shape[1])
        held = replace(
            held,
            length=now.to(asked.device),
            queries=queries,
            query_positions=asked,
        )
        scores = self.policy.scorer.score(held)
        protection, forced = self._require_windows().protection, torch.zeros_like(held.valid)
        if protection is not None:
            forced = protection.covers(rows, held.positions) & held.valid
        budgets = allot(held, scores, forced)
        everything, place = pool.slots(rows)

        def select(per_head: torch.Tensor) -> torch.Tensor:
            share = self.policy.chunk_share
            keep = token2chunk(scores, held.valid, per_head, share, forced)
            if protection is None:
                return keep
            return protection.rebalance(rows, held.positions, keep, scores, held.valid, forced)

        def staying(keep: torch.Tensor) -> torch.Tensor:
            stays = place >= 0
            row, head, index = (held.valid & ~keep).nonzero(as_tuple=True)
            stays[row, head, offset[row, head, index]] = False
            return stays

        def scale() -> Weigh:
            at = pool.fields["positions"][everything].long() - first.to(place.device)[:, None, None]
            at = at.masked_fill(place < 0, -1)
            weigh = self._scale(rows, columns, at, lambda name: pool.fields[name][everything])
            return lambda keeps: weigh([staying(keep) for keep in keeps])

        spare = (held.count.cpu() - budgets.cpu()).clamp_min(0) * 3 // 4 * relent
        bounds = (budgets.cpu(), forced.sum(-1).cpu(), budgets.cpu() + spare)
        # Without room to relent, a guard could only measure in vain.
        keep = self._decide(rows, columns, select, bounds, scale, guarded=relent)
        self._store_notes(held, slots)
        lost = held.valid & ~keep
        pool.compact(rows, everything, place, staying(keep))
        self.evictions += rows.numel()
        self.evicted += int(lost.sum())

    def _queries(
        self, rows: torch.Tensor, columns: int, low: torch.Tensor, now: torch.Tensor, heads: int
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the last queries before position `now`, none older than `low`, and where they are.

        Returns
        -------
        Tensor[R, H_kv, G, A, D] or None
        LongTensor[R, A]
            Positions; -1 for a query that there is not.
        """
        log, device = self.queries.last(rows), self.store.tokens.fields["positions"].device
        wanted = min(self.policy.scorer.queries, self.policy.window)
        asked = now[:, None] + torch.arange(-wanted, 0, device="cpu")
        if log is None or not wanted:
            return None, torch.full_like(asked, -1).to(device)
        place = self.store.first[rows][:, None] + asked - (columns - log.shape[2])
        asked = asked.where((asked >= low[:, None]) & (place >= 0), -1).to(device)
        place = place.clamp_min(0).to(device)
        index = place[:, None, :, None].expand(-1, log.shape[1], -1, log.shape[3])
        return log.gather(2, index).unflatten(1, (heads, -1)), asked
