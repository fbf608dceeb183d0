"""Parts of a journal that several processes write, without the processes: who writes what, when."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from hf_reasoncache.evaluation.journal import Journal
from hf_reasoncache.messages import LONGEST
from hf_reasoncache.processes import Processes


@dataclass(frozen=True)
class Row:
    name: str
    value: int

    @property
    def key(self) -> str:
        return self.name


@dataclass(frozen=True)
class One:
    """One of several processes; the test goes through them in turn, so nobody has to wait."""

    index: int
    count: int

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def wait(self) -> None: ...

    main_only = Processes.main_only


SETTINGS = {"seed": 1}


def journals(path: Path, count: int, settings: dict[str, Any] = SETTINGS) -> list[Journal[Row]]:
    return [
        Journal(path, Row, settings, cast(Processes, One(index, count))) for index in range(count)
    ]


def names(path: Path) -> list[str]:
    return [json.loads(line)["name"] for line in path.read_text().split("\n")[1:-1]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "an[s]wers *.jsonl"


def test_parts_come_into_the_file_in_the_order_of_the_plan(path: Path) -> None:
    first, second = journals(path, 2)
    first.add([Row("c", 3), Row("a", 1)])
    second.add([Row("b", 2)])
    assert "b" not in first.records
    # In turn: the main process joins when the others have written.
    second._file.close()
    first.join("abc")
    second.join("abc")
    assert names(path) == ["a", "b", "c"]
    assert first.records == second.records == {n: Row(n, 1 + "abc".index(n)) for n in "abc"}
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_run_left_is_there_for_any_number_of_processes(path: Path) -> None:
    for number, journal in enumerate(journals(path, 3)):
        with journal:
            journal.add([Row(f"r{number}", number)])
    part = path.with_name(f"{path.name}.part-2")
    part.write_bytes(part.read_bytes()[:-4])
    with journals(path, 1)[0] as alone:
        assert sorted(alone.records) == ["r0", "r1"]
        alone.add([Row("r2", 2)])
    assert names(path) == ["r0", "r1", "r2"]
    assert list(path.parent.iterdir()) == [path]
    # One that was joined already, and not yet deleted, counts once.
    part.write_text('{"settings": {"seed": 1}}\n{"name": "r1", "value": 1}\n')
    for journal in journals(path, 2):
        assert sorted(journal.records) == ["r0", "r1", "r2"]
    assert names(path) == ["r0", "r1", "r2"]


def test_a_full_disk_names_the_file_and_loses_no_answer(path: Path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (journal,) = journals(path, 1)
    with journal:
        journal.add([Row("r0", 0)])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match=r"No space left on device; make room .*jsonl'") as no:
                journal.add([Row("r1", 1)])
    assert Path(no.value.filename) == path
    assert sorted(journals(path, 1)[0].records)[:1] == ["r0"]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"[" * 100_000, "jsonl:2: expected JSON"),
        (b'{"name": [1], "value": 1}', r"jsonl:2: expected names and numbers .* got \[1\]"),
        (b'{"' + b"x" * 100_000 + b'": 1}', "jsonl:2: expected an answer"),
        (b"\xff", "jsonl: expected answers in UTF-8"),
    ],
)
def test_a_damaged_line_is_named(path: Path, line: bytes, match: str) -> None:
    path.write_bytes(b'{"settings": {"seed": 1}}\n' + line + b"\n")
    with pytest.raises(ValueError, match=match) as refused:
        journals(path, 1)
    assert len(str(refused.value).replace(str(path), "")) <= LONGEST


def test_a_part_of_other_settings_is_refused_and_stays(path: Path) -> None:
    for journal in journals(path, 2):
        journal.add([Row(f"r{journal.processes.index}", 0)])
        journal._file.close()
    path.unlink()
    with pytest.raises(ValueError, match=r"part-0: .* differs in seed \(1 there, 2 now\)"):
        journals(path, 1, {"seed": 2})
    assert len(list(path.parent.iterdir())) == 2 + path.exists()
