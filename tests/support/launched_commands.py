"""Runs commands in several processes, as torchrun does; one of them may die after some of the work.

Process 1 reads parts of a calibration more slowly than the other. The variable DEATH, "kill:2" or
"fail:2", ends it when it has finished two pieces of work: as the system does it, or with an error.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hf_reasoncache import cli
from hf_reasoncache.calibration.checkpoint import Checkpoint
from hf_reasoncache.evaluation.journal import Journal


def mortal(finish: Callable[..., None], way: str, after: int) -> Callable[..., None]:
    done = 0

    def finish_or_die(*arguments: Any) -> None:
        nonlocal done
        if done == after and way == "fail":
            raise ValueError("expected a long life, got this")
        if done == after:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        finish(*arguments)

    return finish_or_die


def slow(read: Callable[..., Any]) -> Callable[..., Any]:
    def read_slowly(*arguments: Any) -> Any:
        time.sleep(0.1)
        return read(*arguments)

    return read_slowly


def run(*commands: list[str]) -> None:
    """Run commands one after the other in this process; the first that fails ends it."""
    for command in commands:
        sys.argv = ["hf-reasoncache", *command]
        try:
            cli.main()
        except SystemExit as ended:
            if ended.code:
                raise


def run_as_one_of_several(*commands: list[str]) -> None:
    if os.environ["RANK"] == "1":
        Checkpoint.require = slow(Checkpoint.require)  # type: ignore[method-assign]
    way, _, after = os.environ.get("DEATH", "").partition(":")
    if way and os.environ["RANK"] == "1":
        Journal.add = mortal(Journal.add, way, int(after))  # type: ignore[method-assign]
        Checkpoint.save = mortal(Checkpoint.save, way, int(after))  # type: ignore[method-assign]
    run(*commands)


def launch(*commands: list[str]) -> None:
    """What `torchrun --standalone --nproc-per-node 2` does, except that processes are forked."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, run_as_one_of_several)(*commands)
