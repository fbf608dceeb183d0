"""Draw the lengths of the shipped trace.

python -m examples.research.fleet.make_trace FILE
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from examples.research.fleet.command import run_command
from examples.research.fleet.trace import synthetic_trace, write_trace


def make_trace(
    file: Path,
    lines: Annotated[int, typer.Option(min=1)] = 500,
    seed: int = 0,
) -> None:
    """Draw lengths from log-normal distributions; they are nobody's measurements."""
    write_trace(file, synthetic_trace(lines, seed))


if __name__ == "__main__":
    run_command(make_trace)
