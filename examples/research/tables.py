"""Tables of the docs: a CSV file, and the lines between two markers of a page."""

from __future__ import annotations

import argparse
import csv
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from hf_reasoncache.evaluation.table import markdown_table


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the lines that an earlier run has written, if there was one."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a table, a header first; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Sequence[Mapping[str, str]], note: str) -> str:
    """Return a note and the table below it."""
    return note + "\n\n" + markdown_table(list(rows[0]), rows)


def interval_of_mean(values: np.ndarray, digits: int = 0) -> str:
    """Mean of some differences with its bootstrapped 95% interval."""
    drawn = np.random.default_rng(0).integers(len(values), size=(5000, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    mean, low, high = (f"{each:+.{digits}f}" for each in (values.mean(), low, high))
    return f"{mean} ({low}, {high})"


def versions() -> str:
    """What a table was made with."""
    return (
        f"{platform.machine()} CPU, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def publish(
    rows: Sequence[Mapping[str, str]], note: str, name: str, output: Path, document: Path
) -> None:
    """Write a table to a CSV file and, with a note above it, into a page; say so."""
    write_csv(output / f"{name}.csv", rows)
    insert(document, name, markdown(rows, note))
    print(f"{len(rows)} lines in {output / name}.csv and in {document}")


def show(
    rows: Sequence[Mapping[str, str]], note: str, name: str, arguments: argparse.Namespace
) -> None:
    """Print a table on development problems; publish one on fresh ones."""
    if arguments.development:
        print(markdown(rows, note))
    else:
        publish(rows, note, name, arguments.output, arguments.document)


def insert(document: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of a table in a document."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    content = document.read_text()
    if begin not in content or end not in content:
        raise ValueError(f"{document}: expected the markers {begin.strip()} and {end}, got none.")
    head, rest = content.split(begin, 1)
    document.write_text(head + begin + "\n" + text + "\n" + end + rest.split(end, 1)[1])
