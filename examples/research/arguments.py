"""The command-line arguments that most of these scripts have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.real_model.model import FOLDER
from examples.research.reasoners import REASONERS
from examples.tiny_reasoner import MODELS


def parser(
    doc: str | None, document: str, problems: int, of: str = "of each task"
) -> argparse.ArgumentParser:
    """Return a parser of the family, the number of problems, threads, and where tables go.

    Parameters
    ----------
    doc : str
        Docstring of the script.
    document : str
        Name of the page that has the table.
    problems : int
        Their default number.
    of : str
        What it counts.
    """
    made = plain_parser(doc, document)
    made.add_argument("--family", choices=sorted(MODELS), default="llama")
    made.add_argument("--problems", type=int, default=problems, help=of)
    return made


def reasoner_parser(doc: str | None, document: str, problems: int) -> argparse.ArgumentParser:
    """Return a parser for a script that runs on any of `REASONERS`, over problems of all tasks."""
    made = plain_parser(doc, document)
    made.add_argument("--reasoner", choices=list(REASONERS), default=next(iter(REASONERS)))
    made.add_argument("--problems", type=int, default=problems, help="of all tasks together")
    return made


def real_parser(
    doc: str | None, document: str, threads: int | None = None, model: Path = FOLDER
) -> argparse.ArgumentParser:
    """Return a parser for a script on pretrained weights; `threads` are torch's own by default."""
    made = plain_parser(doc, document, torch.get_num_threads() if threads is None else threads)
    made.add_argument("--model", type=Path, default=model, help="folder of the weights")
    return made


def plain_parser(doc: str | None, document: str, threads: int = 1) -> argparse.ArgumentParser:
    """Return a parser of threads, and of where tables go."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--document", type=Path, default=Path("docs") / document)
    made.add_argument("--output", type=Path, default=Path("docs/results"))
    made.add_argument("--threads", type=int, default=threads)
    return made


def parse(made: argparse.ArgumentParser, given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and set the threads."""
    arguments = made.parse_args(given)
    torch.set_num_threads(arguments.threads)
    return arguments
