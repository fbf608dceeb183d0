"""Requests through one server, step by step, in static batches or joining as they come."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from examples.research.fleet.server import Lengths, Server, Whole
from examples.research.fleet.trace import Request

_STRIDE = 32  # steps that are timed by their first and their last one


@dataclass(frozen=True)
class Served:
    """What became of a request.

    Attributes
    ----------
    arrival, start, end : float
        Seconds: when it came, when its prompt was begun, and when its last answer was there.
    """

    arrival: float
    start: float
    end: float

    @property
    def latency(self) -> float:
        """Seconds from arrival to end."""
        return self.end - self.arrival


def decode_seconds(server: Server, prompt: int, answers: Sequence[Sequence[int]]) -> list[float]:
    """Seconds, after the prompts were read, at which the requests of a static batch end.

    Rows that are done leave the batch and nobody takes their place, as in
    `hf_reasoncache.generation`.

    Parameters
    ----------
    server : Server
    prompt : int
        Tokens of the longest prompt, to which all are padded.
    answers : sequence of sequence of int
        Tokens of each request's answers; the prompt's forward gives the first one.
    """
    lengths = np.array([length for request in answers for length in request])
    owner = np.repeat(np.arange(len(answers)), [len(request) for request in answers])
    ends, now, written = np.zeros(len(lengths)), 0.0, 1
    while written < lengths.max():
        open_ = lengths > written
        steps = min(int(lengths[open_].min()) - written, _STRIDE)
        groups = [prompt] * len(np.unique(owner[open_])) if server.shares else []
        done = np.array([written])
        now += _seconds(server, [prompt], done, groups, steps, copies=int(open_.sum()))
        written += steps
        ends[lengths == written] = now
    return [float(ends[owner == number].max()) for number in range(len(answers))]


def static_batches(server: Server, requests: Sequence[Request], limit: int | None) -> list[Served]:
    """Serve whatever waits as one batch, padded to its longest prompt; then the next.

    Memory is set aside for `limit` tokens per answer, or for the true lengths if that is None (what
    no server knows). Answers are handed out when the batch ends.
    """
    served, now = [], 0.0
    waiting = deque(requests)
    while waiting:
        now = max(now, waiting[0].arrival)
        batch = [waiting.popleft()]
        longest, most = batch[0].prompt, _most(batch[0], limit)
        while waiting and waiting[0].arrival <= now:
            prompt = max(longest, waiting[0].prompt)
            answer = max(most, _most(waiting[0], limit))
            if (len(batch) + 1) * server.needed(prompt, answer) > server.room:
                break
            batch.append(waiting.popleft())
            longest, most = prompt, answer
        seconds = server.prompt_seconds(longest, len(batch))
        seconds += max(decode_seconds(server, longest, [each.answers for each in batch]))
        served += [Served(request.arrival, now, now + seconds) for request in batch]
        now += seconds
    return served


def continuous_batches(
    server: Server, requests: Sequence[Request], limit: int | None
) -> list[Served]:
    """Let requests join between two steps as soon as there is memory, in the order they came.

    New prompts are read one after another while the others wait. A row leaves when its answer ends;
    the memory of a request is free when its last row has left.
    """
    waiting, running = deque(requests), _Rows(server, limit)
    served: list[Served] = []
    while waiting or running:
        if not running:
            running.now = max(running.now, waiting[0].arrival)
        while waiting and waiting[0].arrival <= running.now and running.has_room(waiting[0]):
            running.admit(waiting.popleft())
            served += running.finished()
        if running:
            blocked = bool(waiting) and waiting[0].arrival <= running.now
            until = math.inf if blocked or not waiting else waiting[0].arrival
            running.step(until)
            served += running.finished()
    return served


class _Rows:
    """Requests in a batch that others join and leave."""

    def __init__(self, server: Server, limit: int | None) -> None:
        self.server, self.limit = server, limit
        self.now, self.used = 0.0, 0
        self.prompts = self.written = self.lengths = self.owner = np.zeros(0, dtype=np.int64)
        # By the number of a request: itself, when it began, its memory.
        self.open: dict[int, tuple[Request, float, int]] = {}
        self._count = 0
        self._done: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.open)

    def has_room(self, request: Request) -> bool:
        return self.used + self._needed(request) <= self.server.room

    def _needed(self, request: Request) -> int:
        return self.server.needed(request.prompt, _most(request, self.limit))

    def admit(self, request: Request) -> None:
        needed = self._needed(request)
        self.open[self._count] = request, self.now, needed
        self.used += needed
        rows = len(request.answers)
        self.prompts = np.append(self.prompts, [request.prompt] * rows)
        self.written = np.append(self.written, [1] * rows)
        self.lengths = np.append(self.lengths, request.answers)
        self.owner = np.append(self.owner, [self._count] * rows)
        self._count += 1
        self.now += self.server.prompt_seconds(request.prompt)
        self._leave()

    def step(self, until: float) -> None:
        """Go on until a row ends, or until the first step after time `until`."""
        steps = min(int((self.lengths - self.written).min()), _STRIDE)
        groups = self._groups()
        seconds = _seconds(self.server, self.prompts, self.written, groups, steps)
        if self.now + seconds > until and steps > 1:
            steps = max(1, min(steps, math.ceil((until - self.now) / (seconds / steps))))
            seconds = _seconds(self.server, self.prompts, self.written, groups, steps)
        self.now += seconds
        self.written = self.written + steps
        self._leave()

    def _groups(self) -> list[int]:
        if not self.server.shares:
            return []
        return [request.prompt for request, _, _ in self.open.values()]

    def _leave(self) -> None:
        stay = self.written < self.lengths
        if stay.all():
            return
        left = set(self.owner[~stay].tolist())
        self.prompts, self.written = self.prompts[stay], self.written[stay]
        self.lengths, self.owner = self.lengths[stay], self.owner[stay]
        self._done += left - set(self.owner.tolist())

    def finished(self) -> list[Served]:
        """Requests that have ended since the last call."""
        found = []
        while self._done:
            request, start, needed = self.open.pop(self._done.pop())
            self.used -= needed
            found.append(Served(request.arrival, start, self.now))
        return found


def _seconds(
    server: Server,
    prompts: Lengths,
    written: Whole,
    groups: Sequence[int],
    steps: int,
    copies: int = 1,
) -> float:
    """Seconds of so many steps: their first and their last one stand for those between."""
    first = server.step_seconds(prompts, written, groups, copies)
    if steps == 1:
        return first
    last = server.step_seconds(prompts, written + steps - 1, groups, copies)
    return steps * (first + last) / 2


def _most(request: Request, limit: int | None) -> int:
    return max(request.answers) if limit is None else limit
