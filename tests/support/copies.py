"""Processes that begin as copies of one that has imported the package: in milliseconds, not in 6 s.

What a library reads from the environment when it is imported is what that first process found
there; what it reads later is what the copy is given.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hf_reasoncache.cli", "torch.distributed.run"])


class Copy:
    """A call in a process of its own, on one thread.

    Parameters
    ----------
    function : callable
        At the top of a module, as for any process that Python starts.
    arguments
        Anything that can be pickled.
    environment : mapping
        Variables that it has besides those of the first process.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: object,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._printed = TemporaryDirectory()
        printed = [str(self._file(stream)) for stream in (1, 2)]
        for path in printed:
            Path(path).touch()
        self._process = CONTEXT.Process(
            target=_call, args=(function, arguments, printed, dict(environment or {}))
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Negative where a signal ended it, None while it runs."""
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._file(1).read_text("utf-8")

    @property
    def stderr(self) -> str:
        return self._file(2).read_text("utf-8")

    def wait(self, seconds: float) -> int:
        """How it ended; an error, and its end, where it takes longer."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"took more than {seconds} s; printed {self.stdout}{self.stderr}")
        return self._process.exitcode

    def kill(self) -> None:
        """End it as hard as can be."""
        self._process.kill()
        self._process.join()

    def _file(self, stream: int) -> Path:
        return Path(self._printed.name) / str(stream)


def _call(
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    printed: list[str],
    environment: dict[str, str],
) -> None:
    for stream, path in enumerate(printed, start=1):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)
