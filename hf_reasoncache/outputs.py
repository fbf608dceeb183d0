"""Where results go: one run at a time, and errors that name the file."""

from __future__ import annotations

import errno
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


_HELD_BY_ANOTHER = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_held: dict[Path, int] = {}
"""Outputs that this process writes, and the thread that does."""


def expect_directory(path: Path) -> None:
    """Raise ValueError if there is a file where a directory is to be."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: expected a directory or a new name, got a file.")


def new_directory(path: Path) -> Path:
    """Make a directory for results, with those above it.

    Raises
    ------
    ValueError
        If there is a file of that name.
    OSError
        If it cannot be made, or nothing can be written there.
    """
    expect_directory(path)
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of what is done inside, such as that of a full disk, name the file.

    Raises
    ------
    OSError
        Of the same kind, with the file's name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        remedy = "; make room and repeat the command" if error.errno in _FULL else ""
        raise OSError(error.errno, f"{error.strerror}{remedy}", str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8."""
    with naming(path):
        path.write_text(text, "utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file."""
    with naming(path):
        path.write_bytes(data)


@contextmanager
def sole_writer(output: Path, *, is_main: bool = True) -> Iterator[None]:
    """Be the only run that writes an output; the same thread may ask again inside.

    The lock is the operating system's, on a file `.NAME.lock` beside the output, so it ends with
    its process, however that ends. Of several processes of one run the main one holds it.

    Parameters
    ----------
    output : Path
        A file or a directory, which need not exist; what it is in does.
    is_main : bool
        Whether this process is the one to hold it.

    Raises
    ------
    ValueError
        If another run holds it.
    OSError
        If nothing can be written beside the output.

    Warns
    -----
    UserWarning
        If the file system has no locks.
    """
    output = Path(os.path.abspath(output))
    if not is_main or _held.get(output) == threading.get_ident():
        yield
        return
    path = output.with_name(f".{output.name}.lock")
    descriptor = _acquire(path, output)
    _held[output] = threading.get_ident()
    try:
        yield
    finally:
        _held.pop(output, None)
        # Deleted while it is held: whoever has opened it meanwhile sees that it is gone.
        if sys.platform != "win32":
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, output: Path) -> int:
    """Open and lock a file that is still at its place when it is locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno in _HELD_BY_ANOTHER:
                os.close(descriptor)
                raise ValueError(
                    f"{output}: expected no other run that writes it, got one; wait until that has "
                    "ended, or choose another output."
                ) from error
            warnings.warn(
                f"{path}: expected a file system with locks, got one without ({error.strerror}); "
                f"see to it that no other run writes {output}.",
                stacklevel=4,
            )
            return descriptor
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)
