"""Answers the questions of a grid, one batch at a time, resumable."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_reasoncache.calibration.settings import versions
from hf_reasoncache.evaluation.generation import answer_batch
from hf_reasoncache.evaluation.grid import Grid, Settings
from hf_reasoncache.evaluation.journal import Journal
from hf_reasoncache.evaluation.preparation import Prompts, prepare, require_room
from hf_reasoncache.evaluation.record import Record
from hf_reasoncache.evaluation.specs import Budget, CacheSpec
from hf_reasoncache.evaluation.tasks import Question, Task
from hf_reasoncache.messages import shown
from hf_reasoncache.outputs import new_directory, sole_writer
from hf_reasoncache.processes import Processes
from hf_reasoncache.profiles.fingerprint import fingerprint


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    path: Path,
    settings: Settings | None = None,
    *,
    progress: bool | None = None,
    say: Callable[[str], None] = warnings.warn,
    earlier: bool = False,
) -> list[Record]:
    """Answer all questions of a grid, as far as they are not answered yet.

    Started by `accelerate launch` or `torchrun`, the processes share the batches, and all of them
    return all answers; they must see the same file system. Their number changes no answer.

    Parameters
    ----------
    model : PreTrainedModel
        Its attention implementation is set to what each cache needs.
    tokenizer : PreTrainedTokenizerBase
    grid : Grid
    path : Path
        The journal, see `Journal`: a run that was killed goes on from it, and a grid with more
        specs, budgets or seeds adds to it.
    settings : Settings, optional
    progress : bool, optional
        Whether to show a bar; by default on a terminal.
    say : Callable[[str], None]
        Gets a line wherever the baseline is left out.
    earlier : bool
        Whether to return as well what other caches and budgets have answered in the same journal,
        if they have answered all of the grid's questions of a task and seed.

    Returns
    -------
    list of Record
        Those of this grid, in its order; with `earlier` in the order of the journal.

    Raises
    ------
    ValueError
        If the journal is of another model or other settings, or another run writes it; one of its
        answers is of another question or cache under the same name; or, before any is answered, a
        question is unusable or what is protected of it exceeds a budget: names question and cache.
    ConnectionError
        If another process has ended.
    """
    settings = settings or Settings()
    runner = _Runner(model, tokenizer, settings)
    processes = Processes.of(model)
    attention = model.config._attn_implementation
    about = {"fingerprint": fingerprint(model), **facts(model, settings)}
    batches = list[_Batch]()
    for cell, prompts in runner.possible(grid, say if processes.is_main else lambda line: None):
        _, seed, spec, budget = cell
        require_room(spec, budget, model.config, seed, prompts)
        batches += [_Batch(*cell, each) for each in prompts]
    lock = sole_writer(new_directory(path.parent) / path.name, is_main=processes.is_main)
    with lock, Journal(path, Record, about, processes) as journal:
        for batch in batches:
            batch.check(journal)
        # A batch is repeated whole: its samples depend on all its rows.
        missing = [batch for batch in batches if not batch.answered(journal)]
        try:
            with processes.bar(_rows(processes.share(missing)), "answer", None, progress) as bar:
                for batch in processes.share(missing):
                    bar.set_description(f"{batch.spec.name} {batch.budget or ''}".strip()[:28])
                    journal.add(runner.run(batch))
                    bar.update(len(batch.prompts.questions))
        finally:
            model.set_attn_implementation(attention)
        keys = [key for batch in batches for key in batch.keys]
        journal.join(keys)
        if earlier:
            return _of_the_same_questions(journal.records.values(), grid)
        return [journal.records[key] for key in keys]


def _of_the_same_questions(records: Iterable[Record], grid: Grid) -> list[Record]:
    """Answers of all caches to a grid's questions, but for caches that have not answered all."""
    asked = {key: {each.id for each in questions} for key, questions in grid.questions.items()}
    cells: dict[tuple[str, int, str, Budget | None], list[Record]] = {}
    for each in records:
        if each.question in asked.get((each.task, each.seed), ()):
            cells.setdefault((each.task, each.seed, each.cache, each.budget), []).append(each)
    # Ids that are the same are the same questions: the full cache has answered them for both runs,
    # and a journal refuses two questions of one id.
    whole = (found for cell, found in cells.items() if len(found) == len(asked[cell[:2]]))
    return [each for found in whole for each in found]


def facts(model: PreTrainedModel, settings: Settings) -> dict[str, Any]:
    """All that answers depend on besides question, cache and weights, as JSON values."""
    return {
        "model": Path(model.config._name_or_path).name,
        **vars(settings),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        **versions(),
    }


class _Batch:
    """Questions of one task that one cache answers together."""

    def __init__(
        self,
        task: Task,
        seed: int,
        spec: CacheSpec,
        budget: Budget | None,
        prompts: Prompts,
    ) -> None:
        self.task, self.seed, self.spec, self.budget = task, seed, spec, budget
        self.prompts = prompts
        self.keys = [(task.name, seed, spec.name, budget, each.id) for each in prompts.questions]

    def answered(self, journal: Journal[Record]) -> bool:
        """Whether every question has been answered."""
        return all(key in journal.records for key in self.keys)

    def check(self, journal: Journal[Record]) -> None:
        """Refuse answers to other questions, or by other caches, of the same names."""
        for key, question in zip(self.keys, self.prompts.questions, strict=True):
            record = journal.records.get(key)
            if record is not None and record.digest != _digest(question, self.spec):
                raise ValueError(
                    f"{journal.path}: expected the answer to question {shown(record.question)} "
                    f"with {shown(record.cache)} to be of the same question and settings of the "
                    "cache as now, got others under these names; choose another file, or other "
                    "names."
                )


def _rows(batches: Sequence[_Batch]) -> int:
    return sum(len(batch.keys) for batch in batches)


class _Runner:
    """Turns questions into records."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    def possible(
        self, grid: Grid, say: Callable[[str], None]
    ) -> list[tuple[tuple[Task, int, CacheSpec, Budget | None], list[Prompts]]]:
        """Return all cells but those of the baseline whose prompts do not fit, with the prompts."""
        chat, size = self.settings.chat, self.settings.batch_size
        prompts = {
            key: prepare(questions, self.tokenizer, chat=chat, size=size)
            for key, questions in grid.questions.items()
        }
        found = []
        for cell in grid.cells():
            task, seed, spec, budget = cell
            mine = prompts[task.name, seed]
            # A share of the tokens always has room for a protected prompt.
            if spec is grid.baseline and isinstance(budget, int):
                least = max(each.longest for each in mine) + spec.settings["window"]
                if budget < least:
                    say(
                        f"{task.name}: no {shown(spec.name)} at {budget}, its longest prompt needs "
                        f"a budget of {least} tokens"
                    )
                    continue
            found.append((cell, mine))
        return found

    def run(self, batch: _Batch) -> list[Record]:
        """Answer one batch with a new cache."""
        spec, questions, prompts = batch.spec, batch.prompts.questions, batch.prompts.ids
        spans = batch.prompts.spans
        limits = [each.max_new_tokens or self.settings.max_new_tokens for each in questions]
        self.model.set_attn_implementation(spec.attention)
        found = answer_batch(
            self.model,
            prompts,
            spec.make(self.model.config, batch.budget, spans, batch.seed),
            max_new_tokens=max(limits),
            temperature=self.settings.temperature,
            # Every batch has its own stream, so that a run that goes on draws what it would have.
            seed=batch.seed * 1_000_003 + batch.prompts.start,
            spans=spans,
        )
        records = []
        for question, ids, limit, answer in zip(
            questions, prompts, limits, found.answers, strict=True
        ):
            tokens = answer.tokens[:limit]
            text = str(self.tokenizer.decode(list(tokens)))
            judgement = batch.task.check(question, text)
            records.append(
                Record(
                    task=batch.task.name,
                    seed=batch.seed,
                    cache=spec.name,
                    budget=batch.budget,
                    question=question.id,
                    digest=_digest(question, spec),
                    prompt_tokens=len(ids),
                    answer=text,
                    tokens=len(tokens),
                    finished=answer.finished and len(answer.tokens) < limit,
                    correct=judgement.correct,
                    followed=dict(judgement.followed),
                    leakage=judgement.leakage,
                    held=_number(answer.held),
                    mean_bytes=_number(answer.mean_bytes),
                    keep_rates=[list(layer) for layer in answer.keep_rates],
                    evicted=found.evicted,
                    seconds=found.seconds / len(questions),
                )
            )
        return records


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _digest(question: Question, spec: CacheSpec) -> str:
    return hashlib.sha256(repr((question, spec)).encode()).hexdigest()[:16]
