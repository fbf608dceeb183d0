"""Decoders that take turns, and what a row of a table says of their times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from examples.benchmarks.decoders import Decoder
from examples.benchmarks.results import Row
from examples.benchmarks.workload import held_bytes

TURNS = 16
"""Parts that a round is cut into."""

Item = TypeVar("Item")


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """Return all items, another one first in each turn: the load of a machine comes and goes."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def time_rounds(
    decoders: Sequence[Decoder], rounds: int, clock: Callable[[], float]
) -> dict[str, list[list[float]]]:
    """Run some rounds of every decoder; return by name the seconds of each step of each round."""
    seconds: dict[str, list[list[float]]] = {decoder.name: [] for decoder in decoders}
    for _ in range(rounds):
        for name, steps in take_turns(decoders, clock).items():
            seconds[name].append(steps)
    return seconds


def take_turns(decoders: Sequence[Decoder], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Run one round of every decoder, a few steps at a time, and return the seconds of each step.

    The load of a machine comes and goes within seconds, and falls on all decoders alike this way.
    """
    rounds = {decoder.name: decoder.round(clock) for decoder in decoders}
    seconds: dict[str, list[float]] = {decoder.name: [] for decoder in decoders}
    for turn in range(TURNS):
        for decoder in rotated(decoders, turn):
            share = decoder.steps * (turn + 1) // TURNS - decoder.steps * turn // TURNS
            seconds[decoder.name] += islice(rounds[decoder.name], share)
    for steps in rounds.values():
        # What is left is what a decoder does after its last step.
        next(steps, None)
    return seconds


def timed(row: Row, decoder: Decoder, rounds: Sequence[Sequence[float]]) -> Row:
    """Complete a row with what a decoder took, what it holds, and its note."""
    means = [1e3 * statistics.mean(steps) for steps in rounds]
    return replace(
        row,
        ms=statistics.median(means),
        ms_low=min(means),
        ms_high=max(means),
        ms_step=1e3 * statistics.median(step for steps in rounds for step in steps),
        held_bytes=held_bytes(decoder.cache),
        note=decoder.note,
    )
