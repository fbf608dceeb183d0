"""What a calibration has finished, on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from hf_reasoncache.calibration.settings import differences
from hf_reasoncache.messages import shown
from hf_reasoncache.outputs import naming
from hf_reasoncache.profiles.schema import parse
from hf_reasoncache.profiles.statistics import SAFETENSORS_ERRORS

_SETTINGS = "settings.json"


class Checkpoint:
    """A directory of finished parts, each a file of named tensors that is whole or not there.

    All processes of a run share the directory. Numbers come back bit for bit.

    Parameters
    ----------
    directory : Path
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Make the directory, or go on with one of the same settings; one process calls this.

        Parameters
        ----------
        settings : Mapping
            JSON values: all that the parts depend on.
        resume : bool
            False throws away what is there.

        Raises
        ------
        ValueError
            If what is there was made with other settings, or is no calibration.
        """
        path = self.directory / _SETTINGS
        wanted = json.loads(json.dumps(settings))
        self._require_ours()
        if not resume:
            self.remove()
        if path.exists():
            found = parse(str(path), path.read_bytes())
            if found != wanted:
                raise ValueError(
                    f"{self.directory}: expected an unfinished calibration with these settings, "
                    f"got one that differs in {', '.join(differences(found, wanted))}; repeat it "
                    "as it was, or pass --no-resume to throw it away."
                )
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        _write(path, (json.dumps(wanted, indent=1) + "\n").encode())

    def load(self, part: str) -> dict[str, torch.Tensor] | None:
        """Return a finished part; None if it is not finished.

        Raises
        ------
        ValueError
            If its file is damaged.
        """
        path = self._path(part)
        try:
            return load(path.read_bytes())
        except FileNotFoundError:
            return None
        except SAFETENSORS_ERRORS as error:
            raise ValueError(
                f"{path}: expected a finished part of a calibration, got a damaged file: "
                f"{shown(error)}; delete it and run again."
            ) from error

    def require(self, part: str) -> dict[str, torch.Tensor]:
        """Return a part that another process may have finished.

        Raises
        ------
        ValueError
            If it is not there.
        """
        found = self.load(part)
        if found is None:
            raise ValueError(
                f"{self._path(part)}: expected it from another process, got no file; all processes "
                "of a calibration must see the same output directory."
            )
        return found

    def save(self, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a part; a crash leaves all of it or nothing."""
        _write(self._path(part), save({name: t.contiguous() for name, t in tensors.items()}))

    def remove(self) -> None:
        """Delete the directory, if it is one of ours.

        Raises
        ------
        ValueError
            If it holds something else.
        """
        self._require_ours()
        if self.directory.exists():
            # Settings go last, so that a directory left by a crash is still recognised as ours.
            for path in sorted(self.directory.iterdir(), key=lambda path: path.name == _SETTINGS):
                path.unlink()
            self.directory.rmdir()

    def _require_ours(self) -> None:
        if not self.directory.exists() or (self.directory / _SETTINGS).is_file():
            return
        if any(not path.name.startswith(f".{_SETTINGS}.") for path in self.directory.iterdir()):
            raise ValueError(
                f"{self.directory}: expected an unfinished calibration, got another directory; "
                "choose another output directory."
            )

    def _path(self, part: str) -> Path:
        return self.directory / f"{part}.safetensors"


def _write(path: Path, data: bytes) -> None:
    # The process is part of the name, so that two never write the same temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with naming(temporary), temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
