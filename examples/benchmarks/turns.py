"""Arms that take turns, and what a row of a table says of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

from examples.benchmarks.arms import Arm
from examples.benchmarks.results import Row
from examples.benchmarks.workload import held_bytes

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

TURNS = 16
"""Parts that a round is cut into."""


def time_rounds(
    arms: Sequence[Arm], rounds: int, clock: Callable[[], float]
) -> dict[str, list[list[float]]]:
    """Run some rounds of every arm, and return by name the seconds of each step of each round."""
    seconds: dict[str, list[list[float]]] = {arm.name: [] for arm in arms}
    for _ in range(rounds):
        for name, steps in take_turns(arms, clock).items():
            seconds[name].append(steps)
    return seconds


def take_turns(arms: Sequence[Arm], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Run one round of every arm, a few steps at a time, and return the seconds of each step.

    The load of a machine comes and goes within seconds, and falls on all arms alike this way.
    """
    rounds = {arm.name: arm.round(clock) for arm in arms}
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(TURNS):
        # Another arm begins each time: none is always the first of a turn.
        for arm in [*arms[turn % len(arms) :], *arms[: turn % len(arms)]]:
            share = arm.steps * (turn + 1) // TURNS - arm.steps * turn // TURNS
            seconds[arm.name] += islice(rounds[arm.name], share)
    for steps in rounds.values():
        # What is left is what an arm does after its last step.
        next(steps, None)
    return seconds


def timed(row: Row, arm: Arm, rounds: Sequence[Sequence[float]]) -> Row:
    """Complete a row with what an arm took, what it holds, and its note."""
    means = [1e3 * statistics.mean(steps) for steps in rounds]
    return replace(
        row,
        ms=statistics.median(means),
        ms_low=min(means),
        ms_high=max(means),
        ms_step=1e3 * statistics.median(step for steps in rounds for step in steps),
        held_bytes=held_bytes(arm.cache),
        note=arm.note,
    )
