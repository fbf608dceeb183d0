"""The highest rate that a server sustains, and how long requests wait below it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from examples.research.fleet.server import Server
from examples.research.fleet.simulator import Served, continuous_batches, static_batches
from examples.research.fleet.trace import (
    Lengths,
    Request,
    poisson_requests,
    rate_of,
    recorded_requests,
)

MODES: dict[str, Callable[[Server, Sequence[Request], int | None], list[Served]]] = {
    "continuous": continuous_batches,
    "static": static_batches,
}
_BATCHES = {"continuous": 5, "static": 20}  # times that a simulation fills the server
_FEWEST = 500
_GROWTH = 0.03
_PRECISION = 0.02


@dataclass(frozen=True)
class Workload:
    """What a server is offered.

    Attributes
    ----------
    trace : sequence of Lengths
    count : int or None
        Requests of a simulation; None takes as many as fill the server 5 times, or 20 times with
        static batches, of which it has few otherwise.
    branches : int
    limit : int
        Longest answer; longer ones of the trace are cut there.
    known_lengths : bool
        Whether memory is set aside for the true length of an answer instead of the limit.
    seed : int
    recorded : bool
        Whether the trace's requests come as they came, sped up or slowed down to a rate, instead of
        independently of each other.
    """

    trace: Sequence[Lengths]
    count: int | None
    branches: int
    limit: int
    known_lengths: bool
    seed: int
    recorded: bool = False

    def requests(self, rate: float, count: int) -> list[Request]:
        """Return requests that arrive at so many per second on average."""
        cut = [replace(x, answer=min(x.answer, self.limit)) for x in self.trace]
        if self.recorded:
            return recorded_requests(cut, self.branches, rate / rate_of(cut))
        return poisson_requests(cut, rate, count, self.branches, self.seed)

    def count_for(self, server: Server, mode: str) -> int:
        """Requests of a simulation of one server."""
        if self.count is not None:
            return self.count
        full = server.capacity(self.limit) // self.branches
        return max(_FEWEST, _BATCHES[mode] * full)

    def serve(self, server: Server, mode: str, rate: float) -> Outcome:
        """Simulate one rate."""
        requests = self.requests(rate, self.count_for(server, mode))
        reserved = None if self.known_lengths else self.limit
        return Outcome(rate, MODES[mode](server, requests, reserved))

    def check(self, server: Server) -> None:
        """Raise ValueError unless the longest request fits into an empty server."""
        prompt, answer = max(x.prompt for x in self.trace), self.limit
        needed = server.needed(prompt, answer)
        if needed > server.room:
            raise ValueError(
                f"{server.name}: expected a request of {prompt} + {answer} tokens to fit into "
                f"{server.room / 1e9:.2f} GB, got {needed / 1e9:.2f} GB; take more memory, a "
                "smaller budget, or a smaller --max-new-tokens."
            )


@dataclass(frozen=True)
class Outcome:
    """One simulation.

    Attributes
    ----------
    rate : float
        Requests per second that came.
    served : list of Served
    """

    rate: float
    served: list[Served]

    def latency(self, share: float) -> float:
        """Quantile of the latencies, in seconds, of all but the first tenth of the requests."""
        warm = self._ordered[len(self.served) // 10 :]
        return float(np.quantile([each.latency for each in warm], share))

    @property
    def bounded(self) -> bool:
        """Whether the queue does not grow: the line through the waiting times of the second half
        rises by at most 0.03 seconds per second.

        A server that is offered `1 + x` times what it can do lets waits rise by `x / (1 + x)`.
        """
        late = self._ordered[len(self.served) // 2 :]
        times = np.array([[each.arrival, each.start - each.arrival] for each in late])
        slope = np.polyfit(times[:, 0] - times[0, 0], times[:, 1], 1)[0]
        return bool(slope <= _GROWTH)

    @property
    def _ordered(self) -> list[Served]:
        return sorted(self.served, key=lambda each: each.arrival)


def sustained_rate(server: Server, mode: str, workload: Workload) -> float:
    """Find the highest rate with a bounded queue by bisection, to 2%.

    Starts from what the server completes when everything is there at once, which no rate that it
    sustains exceeds by much.

    Raises
    ------
    ValueError
        If a request does not fit.
    """
    workload.check(server)
    flood = workload.serve(server, mode, 1e12)
    highest = 2 * len(flood.served) / max(each.end for each in flood.served)
    lowest = highest / 64
    while not workload.serve(server, mode, lowest).bounded:
        lowest /= 2
    while highest > (1 + _PRECISION) * lowest:
        middle = (lowest * highest) ** 0.5
        if workload.serve(server, mode, middle).bounded:
            lowest = middle
        else:
            highest = middle
    return lowest
