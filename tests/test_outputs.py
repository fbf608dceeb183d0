"""One run at a time writes an output, crash or not, and errors of writing name the file."""

from __future__ import annotations

import errno
import os
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from hf_reasoncache.outputs import naming, new_directory, sole_writer, write_bytes, write_text
from tests.support.copies import Copy


def hold(output: Path, held: Connection) -> None:
    with sole_writer(output):
        held.send("held")
        time.sleep(60)


def test_another_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    """Killed as hard as can be: what is left behind is a file, and no lock."""
    output = tmp_path / "wave"
    held, sender = Pipe(duplex=False)
    holder = Copy(hold, output, sender)
    try:
        assert held.poll(60) and held.recv() == "held", holder.stderr
        refused = pytest.raises(ValueError, match=r"wave: expected no other run .* got one; wait")
        with refused, sole_writer(output):
            pytest.fail("two writers")
        with sole_writer(tmp_path / "other"):
            pass
    finally:
        holder.kill()
    assert (tmp_path / ".wave.lock").exists()
    with sole_writer(output):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_same_thread_may_ask_again_and_another_may_not(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with sole_writer(tmp_path / "x"):
                pass
        except ValueError as error:
            refused.append(str(error))

    def try_it() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with sole_writer(tmp_path / "x"):
        with sole_writer(tmp_path / "sub" / ".." / "x"):
            pass
        try_it()
        assert len(refused) == 1, "the inner one has not let go"
    try_it()
    assert len(refused) == 1


def test_a_lock_that_was_deleted_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before deletes its file between our opening and our locking it."""
    fcntl = pytest.importorskip("fcntl", reason="the lock of POSIX")
    path, lock, calls = tmp_path / ".x.lock", fcntl.flock, []

    def deleted_first(descriptor: int, how: int) -> None:
        if not calls:
            path.unlink()
        calls.append(descriptor)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", deleted_first)
    with sole_writer(tmp_path / "x"):
        assert len(calls) == 2 and path.exists()


def test_processes_that_are_not_the_main_one_lock_nothing(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "x"), sole_writer(tmp_path / "x", is_main=False):
        assert [each.name for each in tmp_path.iterdir()] == [".x.lock"]
    with sole_writer(tmp_path / "x", is_main=False):
        assert list(tmp_path.iterdir()) == []


def test_without_locks_one_is_warned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl", reason="the lock of POSIX")

    def unsupported(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    without = pytest.warns(UserWarning, match="expected a file system with locks")
    with without, sole_writer(tmp_path / "x"):
        pass


def test_a_directory_for_results(tmp_path: Path) -> None:
    assert new_directory(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: expected a directory or a new name, got a file"):
        new_directory(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file/x"):
        new_directory(tmp_path / "file" / "x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.symlink_to("/dev/full")
    for write in (lambda: write_text(path, "x"), lambda: write_bytes(path, b"x")):
        with pytest.raises(OSError, match=r"No space left on device; make room .*results.json"):
            write()


def test_an_error_that_names_its_file_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path):
        (tmp_path / "none").read_bytes()
    assert Path(caught.value.filename) == tmp_path / "none"
