"""Reading the files of a profile from wherever they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hf_reasoncache.messages import shown
from hf_reasoncache.profiles.encoding import statistics_digest
from hf_reasoncache.profiles.files import CONFIG, STATISTICS, read_bounded

SHIPPED = Path(__file__).parent / "shipped"
"""Profiles inside the package, `MODEL/ESTIMATOR`."""


def shipped() -> list[str]:
    """Return the names of the profiles inside the package."""
    found = SHIPPED.glob(f"*/*/{CONFIG}")
    return sorted(path.parent.relative_to(SHIPPED).as_posix() for path in found)


def is_shipped(name: str) -> bool:
    """Whether `name` is that of a profile inside the package.

    Raises
    ------
    ValueError
        If it has no such profile, but others of that model.
    """
    names = shipped()
    if name in names:
        return True
    if name.partition("/")[0] in {each.partition("/")[0] for each in names}:
        raise unknown(name)
    return False


def unknown(name: str) -> ValueError:
    """The error for a name of nothing."""
    return ValueError(
        "profile: expected a directory that exists, a profile of this package "
        f"({', '.join(shipped())}), or a repository ORG/NAME of the Hub, got {shown(name)}."
    )


class Source(Protocol):
    """Where the files of a profile are: a directory, or a repository of the Hub."""

    @property
    def name(self) -> str:
        """What the user calls it, for errors."""

    def locate(self, name: str, beside: Path | None = None) -> Path:
        """Return the path of a file, of the same version as its neighbour `beside`."""


@dataclass(frozen=True)
class Directory:
    """A directory on this machine."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def locate(self, name: str, beside: Path | None = None) -> Path:
        """Return the path of a file, which may not exist."""
        return self.path / name


def read_profile(source: Source, *, with_statistics: bool = True) -> dict[str, bytes]:
    """Read the files that a profile consists of, by name.

    Only their two names are ever opened, whatever a file says.

    Raises
    ------
    ValueError
        If `config.json` is not a profile's, or a file is over its limit.
    OSError
        If a file is not there or cannot be read.
    """
    config = source.locate(CONFIG)
    content = {CONFIG: read_bounded(config)}
    try:
        digest = statistics_digest(content[CONFIG])
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from error
    if with_statistics and digest is not None:
        content[STATISTICS] = read_bounded(source.locate(STATISTICS, config))
    return content
