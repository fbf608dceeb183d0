"""Problems of a reasoner answered batch by batch: what the scripts share that keep a journal of it.

A run that was stopped goes on where it was, and one that was complete only writes its table again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.research.arguments import reasoner_parser
from examples.research.reasoners import REASONERS, mixed
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, TEST_SEEDS
from hf_reasoncache.evaluation.journal import Journal, Row
from hf_reasoncache.processes import Processes

Key = tuple[str, Any, str, int]
"""Name and number of a way to answer, task, and the first problem of a batch."""


def batches_parser(
    doc: str | None, document: str, batch: int, branches: str | None = None
) -> argparse.ArgumentParser:
    """Return a parser for such a script.

    Parameters
    ----------
    doc : str
        Docstring of the script.
    document : str
        Name of the page that has the table.
    batch : int
        Default number of problems at once.
    branches : str, optional
        Help on the number of branches.
    """
    made = reasoner_parser(doc, document, problems=100)
    made.add_argument("--branches", type=int, default=1, help=branches)
    made.add_argument("--development", action="store_true", help="other problems, no document")
    made.add_argument("--batch", type=int, default=batch)
    made.add_argument("--recordings", type=Path, default=Path("recordings"))
    return made


def seed_of(arguments: argparse.Namespace, place: int) -> int:
    """Return the seed of the problems; `place` of the script's own among development seeds."""
    return DEVELOPMENT_SEEDS[place] if arguments.development else TEST_SEEDS[0]


def table_name(arguments: argparse.Namespace, script: str) -> str:
    """Return the name of a table and of its journal, those of several branches apart."""
    name = f"{script}-{arguments.reasoner}"
    return name if arguments.branches == 1 else f"{name}-{arguments.branches}"


def answer_batches(
    arguments: argparse.Namespace,
    name: str,
    seed: int,
    ways: Sequence[tuple[str, Any]],
    kind: type[Row],
    settings: Mapping[str, Any],
    make: Callable[[PreTrainedModel, PreTrainedTokenizerBase, Key, Sequence[Any]], Row],
) -> list[Row]:
    """Answer what the journal lacks; return its lines for all ways, tasks and batches in order.

    Parameters
    ----------
    arguments : Namespace
        By `batches_parser`.
    name : str
        See `table_name`.
    seed : int
    ways : sequence of (str, number)
        Beginnings of the lines' keys.
    kind : type
        Of a line.
    settings : mapping
        What lines depend on besides problems, batch and seed.
    make : Callable
        Makes a line from the model, its tokenizer, the line's key and the problems of the batch.
    """
    reasoner = REASONERS[arguments.reasoner]
    problems = mixed(reasoner, arguments.problems, seed)
    keys: list[Key] = [
        (*way, task, start)
        for way in ways
        for task, some in problems.items()
        for start in range(0, len(some), arguments.batch)
    ]
    about = {"problems": arguments.problems, "batch": arguments.batch, "seed": seed, **settings}
    path = arguments.recordings / f"{name}-{seed}.jsonl"
    with Journal(path, kind, about, Processes(cpu=True)) as journal:
        missing = [key for key in keys if key not in journal.records]
        if missing:
            model, tokenizer = reasoner.load()
            model.set_attn_implementation("reasoncache")
        for key in tqdm(missing, unit="batch", desc=name):
            _, _, task, start = key
            some = problems[task][start : start + arguments.batch]
            journal.add([make(model, tokenizer, key, some)])
        return [journal.records[key] for key in keys]
