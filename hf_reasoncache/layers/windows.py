"""Where the windows of each row lie, and how much of one stays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from hf_reasoncache.layers.window_policy import WindowPolicy
from hf_reasoncache.protection import RowProtection


@dataclass(frozen=True, eq=False)
class RowWindows:
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
    protection : RowProtection or None
    """

    policy: WindowPolicy
    first: torch.Tensor
    prompt: torch.Tensor
    start: torch.Tensor
    sweep: torch.Tensor
    limit: torch.Tensor | None
    protection: RowProtection | None = None

    def __post_init__(self) -> None:
        # Now, because a captured step may ask for them but not compute them.
        _ = self.calm, self.placed

    @staticmethod
    def after_prompt(
        policy: WindowPolicy,
        first: torch.Tensor,
        columns: int,
        before: RowWindows | None,
        protection: RowProtection | None,
    ) -> RowWindows:
        """Place the windows when the prompt has grown to `columns` columns.

        Parameters
        ----------
        policy : WindowPolicy
        first : LongTensor[B]
        columns : int
        before : RowWindows or None
            The windows in the shorter prompt, if there was one.
        protection : RowProtection or None
        """
        prompt = (columns - first).where(first >= 0, 0)
        protected = prompt if policy.protect_prompt else torch.zeros_like(prompt)
        kept = protected if protection is None else torch.maximum(protected, protection.count)
        limits = [policy.limit(tokens) for tokens in kept.tolist()]
        carried = not policy.protect_prompt and before is not None
        return RowWindows(
            policy=policy,
            first=first,
            prompt=prompt,
            start=before.start if carried and before is not None else protected,
            sweep=before.sweep if carried and before is not None else protected,
            limit=None if policy.max_budget is None else torch.tensor(limits, device="cpu"),
            protection=protection,
        )

    @cached_property
    def end(self) -> torch.Tensor:
        """LongTensor[B]: position behind each row's next window."""
        window, phase = self.policy.window, self.policy.phase
        aligned = self.start + window - (self.start - phase) % window
        return aligned.where(self.start >= self.prompt, torch.minimum(aligned, self.prompt))

    @cached_property
    def placed(self) -> bool:
        """Whether every row has begun."""
        return bool((self.first >= 0).all())

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

    def check_whitelist(self) -> None:
        """Raise ValueError if the whitelist is more than may stay of a prompt."""
        if self.protection is None or self.protection.settings.keep is None:
            return
        rows = zip(self.prompt.tolist(), self.protection.count.tolist(), strict=True)
        for row, (prompt, listed) in enumerate(rows):
            self.policy.require_whitelist(prompt, listed, row)

    def advance(self, rows: torch.Tensor) -> RowWindows:
        """Go on to the next window in some rows."""
        return replace(self, start=self.start.index_put((rows,), self.end[rows]))

    def stretch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the oldest windows, positions from and to, that were not compressed again yet.

        They hold about as many tokens as a new window. When all the past has had its turn, it
        begins again with the oldest.
        """
        oldest = self.prompt[rows] if self.policy.protect_prompt else torch.zeros_like(rows)
        low = self.sweep[rows].where(self.sweep[rows] < self.start[rows], oldest)
        span = self.policy.window * max(1, round(self.policy.window / max(self.policy.kept, 1)))
        return low, torch.minimum(low + span, self.start[rows])

    def sweep_to(self, rows: torch.Tensor, position: torch.Tensor) -> RowWindows:
        """Note up to where the past of some rows has been compressed again."""
        return replace(self, sweep=self.sweep.index_put((rows,), position))

    def crop(self, columns: int) -> RowWindows:
        """Go back to `columns` columns: what comes next begins a window there."""
        length = (columns - self.first).where(self.first >= 0, 0)
        moved = (torch.minimum(x, length) for x in (self.prompt, self.start, self.sweep))
        prompt, start, sweep = moved
        return replace(self, prompt=prompt, start=start, sweep=sweep)

    def select_rows(self, rows: torch.Tensor) -> RowWindows:
        """Keep, repeat or reorder rows."""
        return replace(
            self,
            first=self.first[rows],
            prompt=self.prompt[rows],
            start=self.start[rows],
            sweep=self.sweep[rows],
            limit=None if self.limit is None else self.limit[rows],
            protection=None if self.protection is None else self.protection.select_rows(rows),
        )
