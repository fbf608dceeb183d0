"""The full cache's own answers, read again by every cache: where predictions begin to differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_reasoncache.evaluation.fidelity import (
    Fidelity,
    Piece,
    Reading,
    TextGrid,
    read_texts,
    sum_up,
)
from hf_reasoncache.evaluation.grid import Grid
from hf_reasoncache.evaluation.preparation import prepare
from hf_reasoncache.evaluation.record import Record
from hf_reasoncache.evaluation.specs import Budget


def reread(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    records: Sequence[Record],
    directory: Path,
    *,
    chat: bool,
    chunk: int = 1,
    progress: bool | None = None,
) -> dict[tuple[str, str, Budget | None], Fidelity]:
    """Let every cache of a run read the answers of the full one, token by token.

    Until the first difference a greedy cache would have written the same answer.

    Parameters
    ----------
    model, tokenizer
    grid : Grid
    records : sequence of Record
        What `evaluate` has returned for it; other caches and budgets are left out.
    directory : Path
        Gets `readings-SEED.jsonl`, from which a second run goes on.
    chat : bool
        As in the settings of the run.
    chunk : int
        Tokens per forward.
    progress : bool, optional

    Returns
    -------
    dict
        By task, cache and budget, the full cache included; empty answers are left out.
    """
    specs = {spec.name: spec for spec in grid.all_specs}
    asked = {(seed, spec.name, budget) for _, seed, spec, budget in grid.cells()}
    found: dict[tuple[str, str, Budget | None], list[Reading]] = defaultdict(list)
    for seed in grid.seeds:
        mine = [each for each in records if (each.seed, each.cache, each.budget) in asked]
        pieces = _pieces(tokenizer, grid, seed, mine, chat)
        tried: dict[Budget, list[str]] = {}
        for cache, budget in dict.fromkeys((each.cache, each.budget) for each in mine):
            if budget is not None:
                tried.setdefault(budget, []).append(cache)
        for budget, names in tried.items() if pieces else ():
            cells = TextGrid(
                pieces=list(pieces.values()),
                specs=[specs[name] for name in names],
                budgets=[budget],
                controls=False,
                chunk=chunk,
                batch_size=1,
                seed=seed,
            )
            path = directory / f"readings-{seed}.jsonl"
            tasks = {piece.name: task for (task, _), piece in pieces.items()}
            for reading in read_texts(model, cells, path, progress=progress):
                # The full cache is read beside every budget, and counts once.
                known = found[tasks[reading.piece], reading.cache, reading.budget]
                if reading not in known:
                    known.append(reading)
    result: dict[tuple[str, str, Budget | None], Fidelity] = {}
    for task in dict.fromkeys(task for task, *_ in found):
        read = [each for (name, *_), readings in found.items() if name == task for each in readings]
        result |= {(task, each.cache, each.budget): each for each in sum_up(read, {})}
    return result


def _pieces(
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    seed: int,
    records: Sequence[Record],
    chat: bool,
) -> dict[tuple[str, str], Piece]:
    """Prompt and answer of the full cache for every question of a seed, by task and question."""
    answers = {(each.task, each.question): each.answer for each in records if each.budget is None}
    found = {}
    for task in grid.tasks:
        questions = grid.questions[task.name, seed]
        for prompts in prepare(questions, tokenizer, chat=chat, size=1):
            key = task.name, prompts.questions[0].id
            answer = tokenizer(answers[key], add_special_tokens=False)["input_ids"]
            if answer:
                ids = prompts.ids[0]
                found[key] = Piece("/".join(key), (*ids, *answer), len(ids), prompts.spans)
    return found
