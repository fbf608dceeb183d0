"""The simulator against queues whose waiting times are known, and against direct sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from examples.research.fleet.search import Outcome, Workload, sustained_rate
from examples.research.fleet.server import Ceiling, Server
from examples.research.fleet.simulator import (
    Served,
    continuous_batches,
    decode_seconds,
    static_batches,
)
from examples.research.fleet.trace import Lengths, Request, poisson_requests
from hf_reasoncache import ReasonAllocCache, SharedBranchCache
from hf_reasoncache.planning import DEVICES, ModelSize, RowWork
from tests.support.models import build

CONFIG = build("llama", attention="eager").config
SIZE = ModelSize.of(CONFIG, torch.float32)


@dataclass(frozen=True)
class Clock:
    """Steps of one second for up to any number of rows, prompts for nothing."""

    per_row: float = 0.0
    reading: float = 0.0

    def step(self, rows: int, moved: float, flops: float) -> float:
        return 1.0 + self.per_row * rows

    def prompts(self, prompt: int, rows: int) -> float:
        return self.reading * rows


def server(rows: int, timing=None, cache=None, branches: int = 1, longest=(8, 512)) -> Server:
    """A server with room for so many requests of 8 + 512 tokens."""
    made = Server(
        name="test",
        cache=cache or DynamicCache(config=CONFIG),
        config=CONFIG,
        size=SIZE,
        room=0,
        timing=timing or Clock(),
        longest=longest,
        branches=branches,
    )
    made.room = rows * made.needed(8, 512)
    return made


def poisson(rate: float, answers, count: int = 4000, seed: int = 3) -> list[Request]:
    return poisson_requests([Lengths(8, each) for each in answers], rate, count, 1, seed)


def mean_wait(served) -> float:
    ordered = sorted(served, key=lambda each: each.arrival)[len(served) // 10 :]
    return float(np.mean([each.start - each.arrival for each in ordered]))


@pytest.mark.parametrize("serve", [continuous_batches, static_batches])
@pytest.mark.parametrize("lengths", [[101], [11, 51, 301]])
def test_one_row_is_a_queue_with_one_server(serve, lengths: list[int]) -> None:
    """Against Lindley's recursion exactly, and the mean wait of Pollaczek and Khinchine."""
    times = np.array(lengths) - 1.0
    rate = 0.4 / times.mean()
    requests = poisson(rate, lengths, 2500)
    served = serve(server(1), requests, 512)
    free = 0.0
    for request, found in zip(requests, sorted(served, key=lambda x: x.arrival), strict=True):
        free = max(free, request.arrival)
        assert found.start == pytest.approx(free)
        free += request.answers[0] - 1
        assert found.end == pytest.approx(free)
    if len(lengths) == 1:
        assert mean_wait(served) == pytest.approx(0.4 / rate * 0.4 / (2 * (1 - 0.4)), rel=0.2)


def test_enough_rows_never_wait() -> None:
    """Between two steps of one second nobody can begin, that is all."""
    served = continuous_batches(server(400), poisson(1.0, [101], 500), 512)
    assert all(0 <= each.start - each.arrival <= 1 for each in served)
    assert all(each.end - each.start == pytest.approx(100) for each in served)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.floats(0, 300), st.integers(1, 8), st.integers(1, 60)), min_size=1, max_size=25
    ),
    st.integers(1, 4),
)
def test_every_request_is_served_once_and_memory_holds(drawn, rows: int) -> None:
    requests = sorted(
        (Request(at, prompt, (answer,)) for at, prompt, answer in drawn), key=lambda r: r.arrival
    )
    for serve in (continuous_batches, static_batches):
        served = serve(server(rows, Clock(0.1, 0.5)), requests, 512)
        assert sorted(s.arrival for s in served) == [r.arrival for r in requests]
        assert all(s.arrival <= s.start < s.end for s in served)
        for at in [s.start for s in served]:
            assert sum(s.start <= at < s.end for s in served) <= rows


def test_little_s_law() -> None:
    """Requests in the system on average are their rate times their time in it."""
    served = continuous_batches(server(5, Clock(0.2)), poisson(0.015, [51, 151], 2000), 512)
    times = np.array([[each.arrival, each.end] for each in served])
    grid = np.linspace(times[300, 0], times[-300, 0], 5000)
    inside = [((times[:, 0] <= at) & (at < times[:, 1])).sum() for at in grid]
    latency = float(np.mean(times[300:-300, 1] - times[300:-300, 0]))
    rate = (len(served) - 600) / (times[-300, 0] - times[300, 0])
    assert float(np.mean(inside)) == pytest.approx(rate * latency, rel=0.03)


@pytest.mark.parametrize("kind", ["full", "budget", "shared"])
def test_a_static_batch_is_the_sum_of_its_steps(kind: str) -> None:
    """Against every step by itself, from the config."""
    caches = {
        "full": lambda: DynamicCache(config=CONFIG),
        "budget": lambda: ReasonAllocCache(CONFIG, budget=32, buffer=8),
        "shared": lambda: SharedBranchCache(CONFIG),
    }
    device, answers = DEVICES["L4"], [[5, 90], [200, 300]]
    timing = Ceiling(SIZE, device, CONFIG)
    here = server(4, timing, caches[kind](), branches=2, longest=(16, 300))
    expected, ends = 0.0, {}
    for written in range(1, 300):
        work = RowWork.of(caches[kind](), CONFIG, prompt=16, generated=written, dtype=torch.float32)
        rows = [sum(length > written for length in each) for each in answers]
        moved = sum(work.shared + count * work.own for count in rows if count)
        expected += timing.step(sum(rows), moved, sum(rows) * work.flops)
        ends[written + 1] = expected
    found = decode_seconds(here, 16, answers)
    assert found[1] == pytest.approx(expected, rel=0.02)
    assert found[0] == pytest.approx(ends[90], rel=0.02)


def test_the_sustained_rate_of_a_known_server() -> None:
    """100 seconds for each of 4 rows: 0.04 requests per second."""
    workload = Workload([Lengths(8, 101)], 1000, 1, 512, False, seed=0)
    rate = sustained_rate(server(4), "continuous", workload)
    assert rate == pytest.approx(0.04, rel=0.08)
    quiet, busy = (workload.serve(server(4), "continuous", x * rate) for x in (0.3, 1.5))
    assert quiet.bounded and not busy.bounded
    assert quiet.latency(0.5) == pytest.approx(100, abs=1) and busy.latency(0.5) > 500


def test_more_memory_never_lowers_the_rate() -> None:
    workload = Workload([Lengths(8, 20), Lengths(5, 90)], 200, 1, 512, False, seed=1)
    for mode in ("continuous", "static"):
        rates = [sustained_rate(server(rows, Clock(0.05)), mode, workload) for rows in (1, 3, 9)]
        assert rates == sorted(rates) and rates[-1] > 1.5 * rates[0]


def test_true_lengths_let_more_in() -> None:
    """Room for one request of 512 tokens has place for several short ones."""
    requests = [Request(0.0, 8, (65,)) for _ in range(6)]
    blind = continuous_batches(server(1), requests, 512)
    knowing = continuous_batches(server(1), requests, None)
    assert max(each.end for each in knowing) < max(each.end for each in blind)


def test_a_request_that_never_fits() -> None:
    workload = Workload([Lengths(8, 400)], 20, 1, 512, False, seed=0)
    small = server(1)
    small.room -= 1
    with pytest.raises(ValueError, match=r"test: expected a request of 8 \+ 512 tokens to fit"):
        sustained_rate(small, "static", workload)


def test_quantiles_leave_the_beginning_out() -> None:
    served = [Served(at, at, at + (1000 if at < 10 else 1 + at)) for at in range(100)]
    assert Outcome(1.0, served).latency(1.0) == 100
