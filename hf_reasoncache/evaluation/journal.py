"""Every answer of a run on disk, one line each, so that a run that was killed goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Record:
    """One answer: what was asked of whom, what came, and what it is worth.

    Attributes
    ----------
    task, seed, arm, budget, question
        Which answer this is.
    digest : str
        Tells apart what the key only names: the question's text, the cache's settings.
    prompt_tokens : int
    answer : str
        As the model wrote it, special tokens included, without the end token.
    tokens : int
        Tokens of the answer.
    finished : bool
        Whether the answer ended before the longest length.
    correct : bool or None
        None where the question has no right answer.
    followed : dict of str to bool
        Instructions, by name.
    leakage : float or None
        Share of a protected text that the answer gives away.
    held, mean_bytes : float or None
        Tokens held per KV head, and bytes per row, on average over the steps; None of an answer
        shorter than the distance of two looks.
    keep_rates : list of list of float
        For each layer and span of the question, the share of its tokens held, over the same steps.
    evicted : int
        Tokens evicted in the whole batch, layers and heads counted.
    seconds : float
        Time of the batch, divided by its rows.
    """

    task: str
    seed: int
    arm: str
    budget: int | float | None
    question: str
    digest: str
    prompt_tokens: int
    answer: str
    tokens: int
    finished: bool
    correct: bool | None
    evicted: int
    seconds: float
    followed: dict[str, bool] = field(default_factory=dict)
    leakage: float | None = None
    held: float | None = None
    mean_bytes: float | None = None
    keep_rates: list[list[float]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, str, int | float | None, str]:
        """What no two answers of a run have in common."""
        return self.task, self.seed, self.arm, self.budget, self.question


class Journal:
    """A file of JSON lines: the settings of a run, then its answers; a context manager.

    Parameters
    ----------
    path : Path
    settings : Mapping
        JSON values: all that answers depend on besides their own key.

    Raises
    ------
    ValueError
        If the file is of other settings, or is no journal.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.records: dict[tuple[Any, ...], Record] = {}
        wanted = {"settings": json.loads(json.dumps(settings))}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            self._require(wanted["settings"], self._read())
        self._file = path.open("ab")
        if not path.stat().st_size:
            self._write([wanted])

    def __enter__(self) -> Journal:
        """Return the journal."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def add(self, records: Iterable[Record]) -> None:
        """Write answers; they are on the disk when this returns."""
        records = list(records)
        self._write([asdict(record) for record in records])
        self.records |= {record.key: record for record in records}

    def _write(self, rows: list[dict[str, Any]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> dict[str, Any]:
        """Read what is there; the line that a kill has cut off is cut off the file."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        if not whole:
            return {}
        # Not `splitlines`, which also parts at characters that answers may have.
        first, *rest = whole.decode().removesuffix("\n").split("\n")
        settings = self._parse(first, 1).get("settings")
        if not isinstance(settings, dict):
            raise ValueError(f"{self.path}: expected the answers of a run, got another file.")
        names = {each.name for each in fields(Record)}
        for number, line in enumerate(rest, 2):
            row = self._parse(line, number)
            if set(row) != names:
                raise ValueError(f"{self.path}:{number}: expected an answer, got {sorted(row)}.")
            record = Record(**row)
            self.records[record.key] = record
        return settings

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}:{number}: expected JSON, got: {error}") from error
        return row if isinstance(row, dict) else {}

    def _require(self, wanted: dict[str, Any], found: dict[str, Any]) -> None:
        differing = sorted(
            f"{name} ({found.get(name)!r:.40} there, {wanted.get(name)!r:.40} now)"
            for name in {*found, *wanted}
            if found.get(name) != wanted.get(name)
        )
        # Nothing was found where the very first line had been cut off.
        if found and differing:
            raise ValueError(
                f"{self.path}: expected answers of a run with these settings, got one that "
                f"differs in {', '.join(differing)}; repeat it as it was, or choose another file."
            )
