"""The command-line options that several benchmarks have."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.workload import DTYPES

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def new_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser that shows defaults."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def add_common(
    made: argparse.ArgumentParser, *, threads: int | None = None, clock: str = "wall"
) -> None:
    """Add what the benchmarks of a CPU share: tiny sizes, threads, clock and seed."""
    made.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that everything runs"
    )
    of = "of torch" if threads else "of torch; by default torch decides"
    made.add_argument("--threads", type=int, default=threads, help=of)
    made.add_argument("--clock", choices=CLOCKS, default=clock)
    made.add_argument("--seed", type=int, default=0)


def add_output(made: argparse.ArgumentParser, help: str) -> None:
    """Add the folder for the files of a run; without it there are none."""
    made.add_argument("--output", type=Path, help=help)


def dtypes_of(made: argparse.ArgumentParser, text: str) -> tuple[str, ...]:
    """Read `--dtypes`, names with commas between them; ends the command for one that is unknown."""
    names = tuple(text.split(","))
    if unknown := set(names) - set(DTYPES):
        made.error(f"--dtypes: expected some of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    return names


def read_options(
    made: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    switch: str = "quick",
    **tiny: Any,
) -> argparse.Namespace:
    """Read the command line, and set the threads if it says how many.

    Parameters
    ----------
    made : ArgumentParser
    arguments : sequence of str or None
    switch : str
        The option under which `tiny` are the defaults.
    **tiny
        Defaults of a run whose times mean nothing.
    """
    chosen = made.parse_args(arguments)
    if getattr(chosen, switch):
        made.set_defaults(**tiny)
        chosen = made.parse_args(arguments)
    if getattr(chosen, "threads", None) is not None:
        torch.set_num_threads(chosen.threads)
    return chosen
