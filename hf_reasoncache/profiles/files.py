"""The two files of a profile: read with limits, and written so that no crash leaves a mixture."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from hf_reasoncache.outputs import expect_directory, naming

CONFIG = "config.json"
STATISTICS = "statistics.safetensors"
LIMITS = {CONFIG: 4 * 2**20, STATISTICS: 256 * 2**20}
"""Largest size of each file in bytes. No other file of a directory is ever opened."""


def read_bounded(path: Path) -> bytes:
    """Read one of the two files, a regular file within its limit.

    Symbolic links are followed, since the Hub's cache consists of them.

    Raises
    ------
    ValueError
        If it is no regular file (a pipe or a device may never end), or larger.
    OSError
        If it cannot be read; FileNotFoundError if it is not there.
    """
    limit = LIMITS[path.name]
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: expected this file of a profile, got none; check the path, or copy the "
            "profile again."
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: expected a regular file, got another kind of file.")
    with path.open("rb") as file:
        # The file may grow between the two, so the limit holds for the reading as well.
        data = file.read(limit + 1)
    if len(data) > limit:
        raise too_large(str(path), max(found.st_size, len(data)))
    return data


def too_large(path: str, size: int) -> ValueError:
    """The error for a file of `size` bytes, which is over its limit."""
    limit = LIMITS[path.rpartition("/")[2]]
    return ValueError(
        f"{path}: expected at most {limit:,} bytes, got {size:,}; a profile keeps summaries, not "
        "raw attention."
    )


def expect_ours(path: str, config: bytes) -> None:
    """Raise ValueError if a `config.json` that would be overwritten is not a profile's."""
    if b'"format_version"' not in config:
        raise ValueError(
            f"{path}: expected no file or a profile's, got another file, perhaps a model's config; "
            "give the profile a place of its own."
        )


def expect_place(directory: Path) -> None:
    """Raise ValueError unless `directory` can become a profile's, or is one."""
    expect_directory(directory)
    config = directory / CONFIG
    if config.exists():
        expect_ours(str(config), read_bounded(config))


def write_profile(directory: Path, files: Mapping[str, bytes]) -> None:
    """Make `directory` hold these two files; without statistics, only the first.

    A crash leaves the old profile, the new one, or none: a directory without `config.json` is no
    profile. Other files stay as they are.

    Raises
    ------
    ValueError
        If it is a file, its `config.json` is not a profile's, or a file is over its limit.
    OSError
        If the directory cannot be written.
    """
    for name, data in files.items():
        if len(data) > LIMITS[name]:
            raise too_large(str(directory / name), len(data))
    config, statistics = directory / CONFIG, directory / STATISTICS
    expect_place(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if STATISTICS not in files:
        _replace(config, files[CONFIG])
        statistics.unlink(missing_ok=True)
        return
    # Two files cannot be replaced at once; in between there is no profile.
    prepared = _temporary(statistics, files[STATISTICS])
    try:
        config.unlink(missing_ok=True)
        prepared.replace(statistics)
    finally:
        prepared.unlink(missing_ok=True)
    _replace(config, files[CONFIG])


def _replace(path: Path, data: bytes) -> None:
    prepared = _temporary(path, data)
    try:
        prepared.replace(path)
    finally:
        prepared.unlink(missing_ok=True)


def _temporary(path: Path, data: bytes) -> Path:
    """Write `data` to a new file beside `path`, down to the disk."""
    # Not tempfile's: those are readable by their owner only, and so would be the profile.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with naming(path), temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
