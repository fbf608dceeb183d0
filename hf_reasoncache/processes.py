"""The processes of one run, as accelerate or torchrun has started them."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

Work = TypeVar("Work")

_PATIENCE = timedelta(days=1)
"""How far one process may be ahead of another. One that has ended is noticed at once; this is for
long answers; torch's own limits, 10 to 30 minutes, are shorter than some."""


class Processes:
    """Who shares the work, and which of them this one is; alone, if nothing was launched.

    Parameters
    ----------
    cpu : bool
        Whether the work is done on CPUs although there may be other devices.

    Attributes
    ----------
    index, count : int
        This process, and how many there are.
    device : torch.device
        The one that is this process's own.

    Warns
    -----
    UserWarning
        If accelerate was told to start several and has started one.
    """

    def __init__(self, *, cpu: bool) -> None:
        self._state = PartialState(cpu=cpu, timeout=_PATIENCE)
        self.index: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.device: torch.device = self._state.device
        if self.count == 1 and {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys():
            warnings.warn(
                "expected several processes, got one: accelerate launch leaves those of CPUs to "
                "MPI; use torchrun --nproc-per-node N -m ... for several on this machine.",
                stacklevel=1,
            )

    @staticmethod
    def of(model: Any) -> Processes:
        """Return those that work with a model like this one, each with a whole one.

        Raises
        ------
        ValueError
            If the processes hold shards of one model: they cannot answer different prompts.
        """
        shards = getattr(model, "tp_size", None) or 1
        if shards > 1:
            raise ValueError(
                f"expected a whole model in each process, got one of {shards} shards (tp_plan); "
                "load it without tp_plan to share prompts between processes."
            )
        return Processes(cpu=model.device.type == "cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks, and writes what there is one of."""
        return self.index == 0

    def share(self, work: Sequence[Work]) -> Sequence[Work]:
        """Return what of some work is this process's: every `count`-th piece."""
        return work[self.index :: self.count]

    def wait(self) -> None:
        """Wait until all processes are here.

        Raises
        ------
        ConnectionError
            If another one has ended instead.
        """
        if self.count == 1:
            return
        try:
            self._state.wait_for_everyone()
        except RuntimeError as error:
            raise ConnectionError(
                f"process {self.index}: expected all {self.count} processes to come this far, got "
                "one that has ended; see its error, and repeat the command: what was finished is "
                "kept."
            ) from error

    def main_only(self, work: Callable[[], object]) -> None:
        """Let the main process do some work once all are here, and all go on when it is done.

        Raises
        ------
        ConnectionError
            If another process has ended.
        """
        self.wait()
        if self.is_main:
            work()
        self.wait()

    def gather(self, value: Work) -> list[Work]:
        """Return what every process has passed here, in the order of the processes."""
        self.wait()
        gathered: list[Work] = gather_object([value])
        return gathered

    def bar(
        self, total: int, unit: str, name: str | None = None, progress: bool | None = None
    ) -> tqdm:
        """Return a progress bar over the main process's share; the others have about as much to do.

        Parameters
        ----------
        total : int
        unit : str
        name : str, optional
        progress : bool, optional
            Whether to show it: where standard error is no terminal as a line for every piece of
            work, for logs. By default only on a terminal.
        """
        disable = None if progress is None else not progress
        hidden = disable if self.is_main else True
        kind = tqdm if hidden or sys.stderr.isatty() else _Lines
        return kind(total=total, desc=name, unit=unit, disable=hidden)


class _Lines(tqdm):
    """A bar as a line for every piece of work that is done."""

    def __init__(self, *, desc: str | None, **settings: Any) -> None:
        self._said = 0
        form = "{desc}{n_fmt} of {total_fmt} {unit}s, {elapsed} gone, {remaining} left{postfix}"
        name = desc and f"{desc}: "
        super().__init__(**settings, desc=name, bar_format=form, mininterval=0, miniters=1)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the line, unless nothing was done since the last one."""
        if self.n > self._said:
            self._said = self.n
            print(str(self) if msg is None else msg, file=self.fp, flush=True)

    def clear(self, nolock: bool = False) -> None:
        """Leave the lines where they are."""

    def close(self) -> None:
        """Leave them, and print no more."""
        self.disable = True
