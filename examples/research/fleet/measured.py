"""Measured step times: a table of them, and the lines fitted through it."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from examples.research.tables import write_csv

_ROUNDS = 10  # of reweighing, which settles after three or four

COLUMNS = ("cache", "kind", "rows", "tokens", "moved", "seconds")


@dataclass(frozen=True)
class Sample:
    """One measured forward, or the mean of several.

    Attributes
    ----------
    cache : str
    kind : str
        "prompt" or "step".
    rows : int
    tokens : int
        Of each row's prompt; of a step 1.
    moved : float
        Bytes of keys and values that a step moves, all rows together (`RowWork.own`).
    seconds : float
    """

    cache: str
    kind: str
    rows: int
    tokens: int
    moved: float
    seconds: float


@dataclass(frozen=True)
class Measured:
    """Times linear in what is done, never less than 0 per unit.

    Attributes
    ----------
    of_step : three of float
        Seconds per step, per row, and per byte of keys and values.
    of_prompt : three of float
        Seconds per forward, per token, and per pair of tokens that may see each other.
    """

    of_step: tuple[float, float, float]
    of_prompt: tuple[float, float, float]

    @staticmethod
    def fit(samples: Sequence[Sample]) -> Measured:
        """Fit by least squares of errors relative to the fit, so that short and long steps count
        alike.

        Raises
        ------
        ValueError
            If there are fewer than three samples of a kind.
        """
        steps = [(1.0, s.rows, s.moved, s.seconds) for s in samples if s.kind == "step"]
        prompts = [
            (1.0, *_prompt(s.tokens, s.rows), s.seconds) for s in samples if s.kind == "prompt"
        ]
        return Measured(_fitted("step", steps), _fitted("prompt", prompts))

    def step(self, rows: int, moved: float, flops: float) -> float:
        """See `Timing.step`; operations follow bytes."""
        return float(np.dot(self.of_step, (1.0, rows, moved)))

    def prompts(self, prompt: int, rows: int) -> float:
        """See `Timing.prompts`."""
        return float(np.dot(self.of_prompt, (1.0, *_prompt(prompt, rows))))


def read_measured(path: Path) -> dict[str, Measured]:
    """Read a table that `write_measured` has written; the fit of each cache.

    Raises
    ------
    ValueError
        If a line is not valid.
    """
    samples = defaultdict(list)
    with path.open(newline="") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            sample = _sample(f"{path}:{number}", line)
            samples[sample.cache].append(sample)
    return {name: Measured.fit(rows) for name, rows in samples.items()}


def write_measured(path: Path, samples: Sequence[Sample]) -> None:
    """Write a table of measured times."""
    write_csv(path, [{name: str(value) for name, value in vars(s).items()} for s in samples])


def _sample(place: str, line: Mapping[str, str]) -> Sample:
    try:
        return Sample(
            line["cache"],
            line["kind"],
            int(line["rows"]),
            int(line["tokens"]),
            float(line["moved"]),
            float(line["seconds"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place}: expected the columns {', '.join(COLUMNS)}, got {dict(line)!r:.80}."
        ) from error


def _prompt(tokens: int, rows: int) -> tuple[float, float]:
    return rows * tokens, rows * tokens * (tokens + 1) / 2


def _fitted(kind: str, rows: Sequence[tuple[float, ...]]) -> tuple[float, float, float]:
    if len(rows) < 3:
        raise ValueError(f"expected at least 3 measured times of a {kind}, got {len(rows)}.")
    table = np.array(rows)
    given, seconds = table[:, :-1], table[:, -1]
    # Columns of one size, or the solver takes bytes for nothing.
    scale = given.max(axis=0)
    found, expected = np.zeros(3), seconds.mean() * np.ones(len(table))
    # Weighed by what is expected: a weight that is itself measured would favour whatever happened
    # to be fast, and predict too little.
    for _ in range(_ROUNDS):
        found, _ = nnls(given / scale / expected[:, None], seconds / expected)
        expected = np.maximum(given / scale @ found, 1e-3 * seconds.mean())
    first, second, third = (found / scale).tolist()
    return first, second, third
