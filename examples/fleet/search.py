"""The highest rate that a server sustains, and how long requests wait below it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from examples.fleet.server import Server
from examples.fleet.simulator import Served, continuous_batches, static_batches
from examples.fleet.trace import Lengths, Request, poisson_requests

MODES: dict[str, Callable[[Server, Sequence[Request], int | None], list[Served]]] = {
    "continuous": continuous_batches,
    "static": static_batches,
}
_GROWTH = 0.05  # of the arrivals in the second half may be left over in a queue that is bounded
_PRECISION = 0.02


@dataclass(frozen=True)
class Workload:
    """What a server is offered.

    Attributes
    ----------
    trace : sequence of Lengths
    count : int
        Requests of a simulation.
    branches : int
    limit : int
        Longest answer; longer ones of the trace are cut there.
    known_lengths : bool
        Whether memory is set aside for the true length of an answer instead of the limit.
    seed : int
    """

    trace: Sequence[Lengths]
    count: int
    branches: int
    limit: int
    known_lengths: bool
    seed: int

    def requests(self, rate: float) -> list[Request]:
        """Draw the requests, arriving at so many per second on average."""
        cut = [Lengths(x.prompt, min(x.answer, self.limit)) for x in self.trace]
        return poisson_requests(cut, rate, self.count, self.branches, self.seed)

    def serve(self, server: Server, mode: str, rate: float) -> Outcome:
        """Simulate one rate."""
        reserved = None if self.known_lengths else self.limit
        return Outcome(rate, MODES[mode](server, self.requests(rate), reserved))

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
        ordered = sorted(self.served, key=lambda each: each.arrival)
        warm = ordered[len(ordered) // 10 :]
        return float(np.quantile([each.latency for each in warm], share))

    @property
    def bounded(self) -> bool:
        """Whether the queue does not grow: of the requests that come in the second half, at most 5%
        more wait at its end than at its beginning.

        Requests in service are not counted; a server fills up at first and then holds as many.
        """
        arrivals = sorted(each.arrival for each in self.served)
        starts = sorted(each.start for each in self.served)
        half = len(arrivals) // 2

        def waiting(at: float) -> int:
            return bisect_right(arrivals, at) - bisect_right(starts, at)

        grown = waiting(arrivals[-1]) - waiting(arrivals[half])
        return grown <= _GROWTH * (len(arrivals) - half)


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
    highest = 2 * workload.count / max(each.end for each in flood.served)
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
