"""Every answer of a run on disk, one line each, so that a run that was killed goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, fields
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from hf_reasoncache.calibration.settings import differences
from hf_reasoncache.messages import shown
from hf_reasoncache.outputs import naming
from hf_reasoncache.processes import Processes


class Keyed(Protocol):
    """A dataclass of JSON values that says which answer it is."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> Hashable:
        """What no two answers of a run have in common."""
        ...


Row = TypeVar("Row", bound=Keyed)


class Journal(Generic[Row]):
    """A file of JSON lines: the settings of a run, then its answers; a context manager.

    One of several processes writes to a part of its own, a journal beside the file. `join` brings
    the parts together, and so does the next journal of the same path where a run was killed,
    whatever the number of processes then.

    Parameters
    ----------
    path : Path
    kind : type
        A dataclass: what a line holds.
    settings : Mapping
        JSON values: all that answers depend on besides their own key.
    processes : Processes
        Each of them makes the same journal, and must see the same file system.

    Attributes
    ----------
    records : dict
        By key, the answers that were found or are this process's own; after `join`, all.

    Raises
    ------
    ValueError
        If the file or a part is of other settings, or is no journal.
    """

    def __init__(
        self, path: Path, kind: type[Row], settings: Mapping[str, Any], processes: Processes
    ) -> None:
        self.path, self.kind, self.processes = path, kind, processes
        self._settings = json.loads(json.dumps(settings))
        self.records: dict[Hashable, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if processes.is_main:
            self._whole()
            self._merge({})
        processes.wait()
        self.records = self._read(path)
        self._open(
            path if processes.count == 1 else path.with_name(f"{path.name}.part-{processes.index}")
        )

    def __enter__(self) -> Journal[Row]:
        """Return the journal."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._close()

    def add(self, records: Iterable[Row]) -> None:
        """Write answers; they are on the disk when this returns."""
        records = list(records)
        self._write([asdict(record) for record in records])
        self.records |= {record.key: record for record in records}

    def join(self, order: Iterable[Hashable]) -> None:
        """Bring together what all processes have written, for all of them; nothing more is added.

        Parameters
        ----------
        order : iterable of keys
            In which order new answers come into the file.
        """
        self._close()
        if self.processes.count == 1:
            return
        self.processes.main_only(
            lambda: self._merge({key: place for place, key in enumerate(order)})
        )
        self.records = self._read(self.path)

    def _merge(self, order: Mapping[Hashable, int]) -> None:
        """Move the answers of all parts into the file."""
        parts = sorted(self.path.parent.glob(f"{escape(self.path.name)}.part-*"))
        known = self._read(self.path)
        found: dict[Hashable, Row] = {}
        for part in parts:
            found |= self._read(part)
        missing = [key for key in found if key not in known]
        new = sorted(missing, key=lambda key: order.get(key, len(order)))
        self._open(self.path)
        self._write([asdict(found[key]) for key in new])
        self._close()
        for part in parts:
            part.unlink()

    def _open(self, path: Path) -> None:
        """Open a file to which answers are added, and begin it with the settings."""
        self._file = path.open("ab")
        if not path.stat().st_size:
            self._write([{"settings": self._settings}])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        with naming(Path(self._file.name)):
            self._file.write("".join(lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def _close(self) -> None:
        # What a full disk has not taken is tried again here.
        with naming(Path(self._file.name)):
            self._file.close()

    def _whole(self) -> None:
        """Cut off the file the line that a kill has cut off."""
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(self.path, whole)

    def _read(self, path: Path) -> dict[Hashable, Row]:
        """Read the whole lines of a journal, and check its settings."""
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            return {}
        try:
            # Not `splitlines`, which also parts at characters that answers may have.
            first, *rest = whole.decode().removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected answers in UTF-8, got: {error}.") from error
        settings = _parse(path, first, 1).get("settings")
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: expected the answers of a run, got another file.")
        differing = differences(settings, self._settings)
        if differing:
            raise ValueError(
                f"{path}: expected answers of a run with these settings, got one that "
                f"differs in {', '.join(differing)}; repeat it as it was, or choose another file."
            )
        names = {each.name for each in fields(self.kind)}
        found: dict[Hashable, Row] = {}
        for number, line in enumerate(rest, 2):
            row = _parse(path, line, number)
            if set(row) != names:
                raise ValueError(f"{path}:{number}: expected an answer, got {shown(sorted(row))}.")
            record = self.kind(**row)
            try:
                found[record.key] = record
            except TypeError as error:
                raise ValueError(
                    f"{path}:{number}: expected names and numbers that say which answer it is, got "
                    f"{shown(record.key)}."
                ) from error
        return found


def _parse(path: Path, line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: expected JSON, got: {shown(error)}") from error
    return row if isinstance(row, dict) else {}
