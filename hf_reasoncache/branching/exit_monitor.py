"""Applies the exit rules after each step of all branches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from hf_reasoncache.branching.consensus import probability_kept
from hf_reasoncache.branching.rules import ExitRules
from hf_reasoncache.branching.vote import Branch, Reason

_FIELDS = 3
"""Columns of a step's confidence: top1, top2, spread (see `Confidence`)."""


class _Window:
    """Mean of the latest `size` steps of every row."""

    def __init__(self, size: int, rows: int) -> None:
        self.size = size
        self.steps: deque[torch.Tensor] = deque()
        self.total = torch.zeros(rows, _FIELDS, dtype=torch.float64)

    def push(self, step: torch.Tensor) -> torch.Tensor:
        """Add a step, Tensor[B, 3], and return the means, of the same shape."""
        self.steps.append(step)
        self.total += step
        if len(self.steps) > self.size:
            self.total -= self.steps.popleft()
        return self.total / len(self.steps)


class ExitMonitor:
    """Decides after every step which branches stop, and why.

    It knows no model: generation and the replay of recorded branches use the same monitor.

    Parameters
    ----------
    rules : ExitRules
    rows : int
        Branches of all problems; those of a problem stand beside each other.
    branches : int
        Branches of a problem; divides `rows`.
    read : Callable[[int], str or None]
        Reads the answer that a row has now.
    """

    def __init__(
        self, rules: ExitRules, rows: int, branches: int, read: Callable[[int], str | None]
    ) -> None:
        self.rules, self.branches, self.read = rules, branches, read
        self.running = torch.ones(rows, dtype=torch.bool)
        self.steps = 0
        self._answers: list[str | None] = [None] * rows
        self._reasons: list[Reason | None] = [None] * rows
        self._tokens = torch.zeros(rows, dtype=torch.long)
        self._total: torch.Tensor | None = None
        self._lowest = torch.full((rows,), torch.inf, dtype=torch.float64)
        self._group = _Window(rules.group, rows)
        self._recent = _Window(rules.decode.window if rules.decode else 1, rows)

    def step(self, ended: torch.Tensor, confidence: torch.Tensor | None) -> None:
        """Judge one more token of every row that is running.

        Parameters
        ----------
        ended : BoolTensor[B]
            Rows whose token ends the sequence.
        confidence : Tensor[B, 3] or None
            See `Confidence`; values of rows that have stopped are ignored.
        """
        self.steps += 1
        self._tokens += self.running
        before = self.running.clone()
        recent = self._measure(confidence) if confidence is not None else None
        for row in (ended & self.running).nonzero()[:, 0].tolist():
            self._stop(row, Reason.END, self.read(row))
        if recent is not None:
            self._stop_confident(recent)
            self._stop_weak()
        changed = (before & ~self.running).view(-1, self.branches).any(-1)
        for problem in changed.nonzero()[:, 0].tolist():
            self._settle(problem)

    def _measure(self, confidence: torch.Tensor) -> torch.Tensor:
        confidence = confidence.double()
        counted = torch.where(self.running[:, None], confidence, 0.0)
        self._total = counted if self._total is None else self._total + counted
        # A group that is not full counts only while the branch has no full one.
        groups = self._group.push(confidence)[:, 2]
        lowest = groups if self.steps <= self.rules.group else self._lowest.minimum(groups)
        self._lowest = torch.where(self.running, lowest, self._lowest)
        return self._recent.push(confidence)

    def _stop(self, row: int, reason: Reason, answer: str | None = None) -> None:
        self.running[row] = False
        self._reasons[row], self._answers[row] = reason, answer

    def _stop_confident(self, recent: torch.Tensor) -> None:
        rule = self.rules.decode
        if rule is None or self.steps < rule.steps or (self.steps - rule.steps) % rule.every:
            return
        top1, top2 = recent[:, 0], recent[:, 1]
        sure = (top1 >= rule.confidence) & (top1 - top2 >= rule.gap * top1)
        for row in (sure & self.running).nonzero()[:, 0].tolist():
            answer = self.read(row)
            if answer is not None:
                self._stop(row, Reason.CONFIDENT, answer)

    def _stop_weak(self) -> None:
        if self.rules.weak is None or self.steps < self.rules.group:
            return
        weak = self.running & (self._lowest < self.rules.weak.threshold)
        # The weakest first, so that the last branch of a problem is its strongest.
        for row in sorted(weak.nonzero()[:, 0].tolist(), key=self._lowest.__getitem__):
            first = row - row % self.branches
            beside = slice(first, first + self.branches)
            unanswered = all(answer is None for answer in self._answers[beside])
            if unanswered and int(self.running[beside].sum()) == 1:
                continue
            self._stop(row, Reason.WEAK)

    def _settle(self, problem: int) -> None:
        if self.rules.consensus is None:
            return
        rows = range(problem * self.branches, (problem + 1) * self.branches)
        left = [row for row in rows if self.running[row]]
        ended = [
            self._answers[row]
            for row in rows
            if self._reasons[row] not in (None, Reason.WEAK, Reason.CONSENSUS)
        ]
        if left and probability_kept(ended, len(left)) >= self.rules.consensus.confidence:
            for row in left:
                self._stop(row, Reason.CONSENSUS)

    def results(self) -> list[list[Branch]]:
        """Return every problem's branches; those still running end here, for their length."""
        mean = None if self._total is None else (self._total / self._tokens[:, None]).tolist()
        found = []
        for row, reason in enumerate(self._reasons):
            found.append(
                Branch(
                    answer=self.read(row) if reason is None else self._answers[row],
                    reason=reason or Reason.LENGTH,
                    tokens=int(self._tokens[row]),
                    confidence=None if mean is None else mean[row][0],
                    runner_up=None if mean is None else mean[row][1],
                    group_confidence=None if mean is None else float(self._lowest[row]),
                )
            )
        return [found[i : i + self.branches] for i in range(0, len(found), self.branches)]
