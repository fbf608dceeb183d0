"""Lengths of requests, from a file of the user's, and the requests drawn from them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("prompt_tokens", "answer_tokens")
ARRIVAL = "arrival"


@dataclass(frozen=True)
class Lengths:
    """One line of a trace.

    Attributes
    ----------
    prompt, answer : int
        Tokens.
    arrival : float or None
        Seconds after the beginning.
    """

    prompt: int
    answer: int
    arrival: float | None = None


@dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    Attributes
    ----------
    arrival : float
        Seconds.
    prompt : int
        Tokens.
    answers : tuple of int
        Tokens of each branch.
    """

    arrival: float
    prompt: int
    answers: tuple[int, ...]


def read_trace(path: Path) -> list[Lengths]:
    """Read a CSV file with a header, or JSON lines (by the name's end, .csv or .jsonl).

    Columns: `prompt_tokens`, `answer_tokens`, and if the times matter `arrival`, in seconds.

    Raises
    ------
    ValueError
        Naming the line, if a number is missing or below 1, or only some lines have an arrival.
    OSError
        If the file cannot be read.
    """
    text = path.read_text("utf-8").splitlines()
    if path.suffix == ".csv":
        lines: list[tuple[int, Any]] = list(enumerate(csv.DictReader(text), start=2))
    elif path.suffix == ".jsonl":
        lines = [(number, _json(path, number, line)) for number, line in enumerate(text, start=1)]
    else:
        raise ValueError(f"{path}: expected a name that ends in .csv or .jsonl.")
    found = [_lengths(f"{path}:{number}", line) for number, line in lines if line]
    if not found:
        raise ValueError(f"{path}: expected at least one request, got none.")
    if len({each.arrival is None for each in found}) > 1:
        raise ValueError(f"{path}: expected an {ARRIVAL} in all lines or in none.")
    return found


def write_trace(path: Path, trace: Sequence[Lengths]) -> None:
    """Write a CSV file that `read_trace` reads."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((each.prompt, each.answer) for each in trace)


def synthetic_trace(count: int, seed: int) -> list[Lengths]:
    """Draw lengths from log-normal distributions; they are nobody's measurements.

    Prompts: median 150 tokens, sigma 0.6, at most 600. Answers, as of a reasoning model: median
    4,000, sigma 0.8, at most 16,384.
    """
    generator = np.random.default_rng(seed)
    prompts = np.exp(generator.normal(math.log(150), 0.6, count)).clip(16, 600)
    answers = np.exp(generator.normal(math.log(4000), 0.8, count)).clip(64, 16384)
    return [Lengths(int(p), int(a)) for p, a in zip(prompts, answers, strict=True)]


def poisson_requests(
    trace: Sequence[Lengths], rate: float, count: int, branches: int, seed: int
) -> list[Request]:
    """Draw requests that come independently of each other.

    The same seed gives the same lengths in the same order at every rate; only the times scale.

    Parameters
    ----------
    trace : sequence of Lengths
        Drawn from with replacement. The answers of one request's branches are drawn one by one
        from lines of the trace.
    rate : float
        Requests per second.
    count : int
    branches : int
    seed : int
    """
    generator = np.random.default_rng(seed)
    arrivals = generator.exponential(1.0, count).cumsum() / rate
    prompts = generator.integers(len(trace), size=count)
    answers = generator.integers(len(trace), size=(count, branches))
    answers[:, 0] = prompts  # prompt and answer of a line belong together
    return [
        Request(float(at), trace[prompt].prompt, tuple(trace[i].answer for i in lines))
        for at, prompt, lines in zip(arrivals, prompts, answers, strict=True)
    ]


def rate_of(trace: Sequence[Lengths]) -> float:
    """Return how many requests per second a trace has by its own times.

    Raises
    ------
    ValueError
        If it has none, or they do not differ.
    """
    times = [each.arrival for each in trace if each.arrival is not None]
    if len(times) < len(trace):
        raise ValueError(f"expected a trace with the column {ARRIVAL}, got one without.")
    if min(times) == max(times):
        raise ValueError(f"{ARRIVAL}: expected times that differ, got {times[0]:g} everywhere.")
    return (len(times) - 1) / (max(times) - min(times))


def recorded_requests(trace: Sequence[Lengths], branches: int, speed: float = 1.0) -> list[Request]:
    """Return the requests of a trace that has times, `speed` times as fast."""
    ordered = sorted(trace, key=lambda each: each.arrival or 0.0)
    return [
        Request((each.arrival or 0.0) / speed, each.prompt, (each.answer,) * branches)
        for each in ordered
    ]


def _json(path: Path, number: int, line: str) -> object:
    try:
        return json.loads(line) if line.strip() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}.") from error


def _lengths(place: str, line: object) -> Lengths:
    values = []
    for column in COLUMNS:
        value = line.get(column) if isinstance(line, Mapping) else None
        try:
            number = int(str(value))
        except ValueError:
            number = 0
        if number < 1:
            raise ValueError(f"{place}: {column}: expected a whole number >= 1, got {value!r}.")
        values.append(number)
    arrival = line.get(ARRIVAL) if isinstance(line, Mapping) else None
    if arrival in (None, ""):
        return Lengths(*values)
    try:
        at = float(str(arrival))
    except ValueError:
        at = math.nan
    if not 0 <= at < math.inf:
        raise ValueError(f"{place}: {ARRIVAL}: expected seconds >= 0, got {arrival!r}.")
    return Lengths(*values, at)
