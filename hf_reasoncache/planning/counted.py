"""One row of a batch, followed through its evictions by counts alone."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from hf_reasoncache.policies.base import Policy, PromptRows
from hf_reasoncache.shards import ALONE
from hf_reasoncache.storage.query_window import QueryWindow

_ROW = torch.zeros(1, dtype=torch.long, device="cpu")


@dataclass(frozen=True)
class Moment:
    """What every KV head of a row has after some token, on average over the heads.

    Attributes
    ----------
    slots : int
    tokens : float
        Tokens held in them: the mean between two evictions, or all of them before the first.
    """

    slots: int
    tokens: float


class CountedRow:
    """A row alone, or one in a batch of equal rows, whose tokens come one by one; see `Counts`.

    It asks the policy what a layer asks, and takes the answers for done. What a second pass finds
    in its windows is an estimate, see `RowState.expected`.

    Parameters
    ----------
    policy : Policy
    prompt : int
        Tokens of the prompt.
    shared : int
        Those of them that branches share, which lie in no pool.

    Raises
    ------
    ValueError
        If the budget cannot hold the prompt.
    """

    def __init__(self, policy: Policy, prompt: int, shared: int) -> None:
        own = prompt - shared
        self.length = self.capacity = _ROW[:, None] + own
        held, elsewhere = _ROW[:, None] + prompt, _ROW + shared
        self._state = policy.begin(PromptRows(_ROW, prompt, held, elsewhere, ALONE), None)
        self._columns = self._prompt = prompt
        self._shared = shared
        # Columns at each eviction, slots afterwards, and tokens before and afterwards.
        self._times: list[int] = []
        self._slots: list[int] = []
        self._tokens: list[tuple[int, int]] = []
        self._evict(self._state.due(self, prompt, 0))

    @property
    def least_free(self) -> int:
        """See `Counts.least_free`."""
        return int(self.capacity - self.length)

    def before(self, rows: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """See `Counts.before`; all tokens from the column on are held, or all before it."""
        if int(column) <= self._prompt:
            return (column[:, None] - self._shared).clamp_min(0)
        return self.length - (self._columns - column)[:, None]

    def at(self, columns: int) -> Moment:
        """Return what there is when `columns` columns have been stored."""
        due = self._due_after(columns)
        last = bisect_left(self._times, columns) - 1
        if last < 1:
            # What a prompt loses at once is no cycle.
            past = self._tokens[0][1] + columns - self._times[0]
            return Moment(self._slots[0], past)
        least = self._tokens[last][1]
        return Moment(self._slots[last], least + (due - self._times[last]) / 2)

    def room(self, columns: int) -> int:
        """How many tokens can come after `columns` columns before something is due."""
        return self._due_after(columns) - columns

    def last_eviction(self, columns: int) -> int:
        """Columns that were stored at the last eviction before there were so many."""
        self._due_after(columns)
        return self._times[max(0, bisect_left(self._times, columns) - 1)]

    def _due_after(self, columns: int) -> int:
        """Columns when the next eviction is due, the first one that is not before `columns`."""
        while True:
            due = self._columns + max(self._state.room(self, self._columns), 0)
            if due >= columns:
                place = bisect_left(self._times, columns)
                return self._times[place] if 0 < place < len(self._times) else due
            self.length = self.length + due - self._columns
            self._columns = due
            self._evict(self._state.due(self, due, 1))

    def _evict(self, rows: torch.Tensor) -> None:
        """Take what is due for evicted, and note what is left."""
        before = int(self.length)
        while rows.numel():
            self._state, span = self._state.next_span(rows, self._columns, self)
            if span is None:
                break
            count = self._state.expected(span, self)
            kept = self._state.quota(span, count, torch.zeros_like(count)).minimum(count)
            self.length = self.length - count + kept
        target = self._state.fitted(self, self._columns)
        self.capacity = self.capacity if target is None else target
        self._times.append(self._columns)
        self._slots.append(int(self.capacity))
        self._tokens.append((before, int(self.length)))


def counted_row(policy: Policy, prompt: int, shared: int) -> CountedRow:
    """Return a row for all its lengths; it remembers the evictions it has been through."""
    plain: Any = policy.counted()
    return _counted_row(plain, prompt, shared)


@lru_cache(maxsize=1024)
def _counted_row(policy: Policy, prompt: int, shared: int) -> CountedRow:
    return CountedRow(policy, prompt, shared)


def kept_queries(row: CountedRow, size: int, prompt: int, generated: int) -> dict[int, int]:
    """How many columns' queries a layer keeps, of the newest `size` that evictions ask about.

    Parameters
    ----------
    row : CountedRow
    size, prompt, generated : int

    Returns
    -------
    dict from int to int
        Columns kept after so many single tokens: after `generated` of them, and around all tokens
        after which layer and queries may take most.
    """
    last = row.last_eviction(prompt + generated) - prompt + 1
    kept: dict[int, int] = {}
    for end in {generated, min(generated, 2 * size), min(generated, max(0, last))}:
        # Whatever was kept earlier is forgotten after so many tokens.
        begin = max(0, end - 2 * size)
        log = _log(row, size, prompt, begin, end)
        kept |= {token: log[token] for token in log if not begin or token >= begin + size}
    return kept


def _log(row: CountedRow, size: int, prompt: int, begin: int, end: int) -> dict[int, int]:
    """Columns in the log of a layer after each of the tokens from `begin` to `end`."""
    log = QueryWindow(size)
    if not begin:
        log.append(torch.empty(1, 1, prompt, 0))
    found = {begin: log.columns}
    for token in range(begin, end):
        # The first token finds an open prompt, see `CacheLayer`.
        if token and row.room(prompt + token) > size:
            log.clear()
        else:
            log.append(torch.empty(1, 1, 1, 0))
        found[token + 1] = log.columns
    return found
