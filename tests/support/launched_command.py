"""One of the processes that a test launches: runs commands, and may die after some of the work.

torchrun ... -m tests.support.launched_command '[["evaluate", ...], ["generate", ...]]'

Process 1 reads parts of a calibration more slowly than the other. The variable DEATH, "kill:2" or
"fail:2", ends it when it has finished two pieces of work: as the system does it, or with an error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

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


def main() -> None:
    if os.environ["RANK"] == "1":
        Checkpoint.require = slow(Checkpoint.require)  # type: ignore[method-assign]
    way, _, after = os.environ.get("DEATH", "").partition(":")
    if way and os.environ["RANK"] == "1":
        Journal.add = mortal(Journal.add, way, int(after))  # type: ignore[method-assign]
        Checkpoint.save = mortal(Checkpoint.save, way, int(after))  # type: ignore[method-assign]
    for command in json.loads(sys.argv[1]):
        sys.argv = ["hf-reasoncache", *command]
        try:
            cli.main()
        except SystemExit as ended:
            if ended.code:
                raise


if __name__ == "__main__":
    main()
