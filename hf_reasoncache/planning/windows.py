"""How large the pool of a layer becomes that compresses its windows."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache

from hf_reasoncache.layers.window_policy import WindowPolicy
from hf_reasoncache.scorers.key_norm import KeyNorm

_ANY = KeyNorm()


def window_pool(
    policy: WindowPolicy, prompt: int, generated: int, elsewhere: int = 0
) -> tuple[int, int]:
    """Slots and tokens per KV head of a `WindowedLayer`, on average over its heads.

    Follows the compactions of a row alone, or of one in a batch of equal rows. What a second pass
    under `max_budget` finds in its windows is taken to lie evenly in the past.

    Parameters
    ----------
    policy : WindowPolicy
    prompt : int
        Tokens of the prompt.
    generated : int
        Tokens stored after it.
    elsewhere : int
        Tokens of the prompt that branches share, which lie in no pool.

    Raises
    ------
    ValueError
        If the bound cannot hold the prompt.
    """
    # Neither which tokens stay nor how that is watched changes how many there are.
    plain = replace(policy, scorer=_ANY, protection=None, risk=None, probes=None)
    return _row(plain, prompt, elsewhere).at(prompt + generated)


@lru_cache(maxsize=1024)
def _row(policy: WindowPolicy, prompt: int, elsewhere: int) -> _Row:
    """Return one row for all its lengths: it remembers the compactions it has been through."""
    row = _Row(policy, prompt, elsewhere)
    row.read_prompt()
    return row


@dataclass
class _Row:
    """One row; the names are those of `RowWindows` and `WindowedLayer`, `past` counts the tokens
    per head that are held of the windows before `start`.
    """

    policy: WindowPolicy
    prompt: int
    elsewhere: int

    def __post_init__(self) -> None:
        policy = self.policy
        self.oldest = self.start = self.sweep = self.prompt if policy.protect_prompt else 0
        limit = policy.limit(self.oldest)
        self.limit = None if limit is None else limit - self.elsewhere
        self.past = self.start - min(self.start, self.elsewhere)
        self.capacity = self.prompt - self.elsewhere
        # Columns at each compaction, and afterwards slots, and tokens less columns.
        self.times: list[int] = []
        self.states: list[tuple[int, int]] = []

    def at(self, columns: int) -> tuple[int, int]:
        """Slots and tokens when `columns` columns have been stored."""
        while self.complete_at < columns:
            self.compress(self.complete_at)
        # What is complete is compressed at the beginning of the next forward.
        capacity, offset = self.states[max(0, bisect_left(self.times, columns) - 1)]
        return capacity, offset + columns

    @property
    def end(self) -> int:
        window = self.policy.window
        aligned = self.start + window - (self.start - self.policy.phase) % window
        return aligned if self.start >= self.prompt else min(aligned, self.prompt)

    @property
    def complete_at(self) -> int:
        return self.end + self.policy.recent

    def read_prompt(self) -> None:
        if self.complete_at < self.prompt:
            self.compress(self.prompt)
        else:
            self.fit(self.prompt)

    def compress(self, columns: int) -> None:
        """Compress what is complete when `columns` columns have been stored."""
        while self.complete_at <= columns:
            share = self.policy.prompt_kept if self.start < self.prompt else self.policy.kept
            window, end = self.policy.window, self.end
            self.past += end * share // window - self.start * share // window
            self.start = end
        if self.limit is not None:
            self.hold_bound(self.limit)
        self.fit(columns)

    def hold_bound(self, limit: int) -> None:
        policy = self.policy
        span = policy.window * max(1, round(policy.window / max(policy.kept, 1)))
        kept = min(policy.kept, policy.window - 1)
        while self.past > limit - policy.recent:
            low = self.sweep if self.sweep < self.start else self.oldest
            self.sweep = min(low + span, self.start)
            # A protected prompt is in no window.
            pinned = max(0, self.oldest - self.elsewhere)
            density = (self.past - pinned) / (self.start - self.oldest)
            found = max(1, round(density * (self.sweep - low)))
            self.past -= found - found * kept // policy.window

    def fit(self, columns: int) -> None:
        policy = self.policy
        length = self.past + columns - self.start
        most = policy.window + policy.recent
        until = length + min(max(self.complete_at - columns, 0), most)
        need = until + policy.spare(length)
        target = policy.rounded(need)
        if self.limit is not None and need <= self.limit + policy.window:
            target = self.limit + policy.window
        if until > self.capacity or 4 * self.capacity > 5 * target:
            self.capacity = target
        self.times.append(columns)
        self.states.append((self.capacity, self.past - self.start))
