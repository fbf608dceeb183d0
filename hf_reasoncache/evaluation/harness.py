"""Carries out a plan, answer by answer, resumable."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_reasoncache.calibration.fingerprint import fingerprint
from hf_reasoncache.calibration.prompts import Message, Prompt
from hf_reasoncache.calibration.settings import versions
from hf_reasoncache.evaluation.arms import Arm, Budget
from hf_reasoncache.evaluation.generation import answer_batch
from hf_reasoncache.evaluation.journal import Journal, Record
from hf_reasoncache.evaluation.plan import Plan, Settings
from hf_reasoncache.evaluation.tasks import Question, Task
from hf_reasoncache.protection import Spans
from hf_reasoncache.protection import spans as find_spans


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    path: Path,
    settings: Settings | None = None,
    *,
    progress: bool | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> list[Record]:
    """Answer all questions of a plan, as far as they are not answered yet.

    Parameters
    ----------
    model : PreTrainedModel
        Its attention implementation is set to what each cache needs.
    tokenizer : PreTrainedTokenizerBase
    plan : Plan
    path : Path
        The journal, see `Journal`: a run that was killed goes on from it, and a plan with more
        arms, budgets or seeds adds to it.
    settings : Settings, optional
    progress : bool, optional
        Whether to show a bar; by default on a terminal.
    say : Callable[[str], None]
        Told where the baseline is left out.

    Returns
    -------
    list of Record
        Those of this plan, in its order.

    Raises
    ------
    ValueError
        If the journal is of another model or other settings, one of its answers is of another
        question or cache under the same name, or a cache refuses a budget.
    """
    settings = settings or Settings()
    runner = _Runner(model, tokenizer, settings)
    attention = model.config._attn_implementation
    with Journal(path, {"fingerprint": fingerprint(model), **facts(model, settings)}) as journal:
        cells = list(runner.possible(plan, say))
        total = sum(len(plan.questions[task.name, seed]) for task, seed, *_ in cells)
        disable = None if progress is None else not progress
        found = []
        try:
            with tqdm(total=total, unit="answer", disable=disable) as bar:
                for task, seed, arm, budget in cells:
                    bar.set_description(f"{arm.name} {budget or ''}".strip()[:28])
                    questions = plan.questions[task.name, seed]
                    for start in range(0, len(questions), settings.batch_size):
                        batch = questions[start : start + settings.batch_size]
                        keys = [(task.name, seed, arm.name, budget, each.id) for each in batch]
                        # A batch is repeated whole: its samples depend on all its rows.
                        if not all(key in journal.records for key in keys):
                            journal.add(runner.run(task, seed, arm, budget, batch, start))
                        for key, question in zip(keys, batch, strict=True):
                            record = journal.records[key]
                            _require_same(record, _digest(question, arm), path)
                            found.append(record)
                        bar.update(len(batch))
        finally:
            model.set_attn_implementation(attention)
    return found


def facts(model: PreTrainedModel, settings: Settings) -> dict[str, Any]:
    """All that answers depend on besides question, cache and weights, as JSON values."""
    return {
        "model": Path(model.config._name_or_path).name,
        **vars(settings),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        **versions(),
    }


class _Runner:
    """Turns questions into records."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    def encode(self, question: Question) -> tuple[int, ...]:
        """Token ids of a prompt."""
        prompt = Prompt(question.prompt, f"question {question.id!r}")
        return prompt.encode(self.tokenizer, chat=self.settings.chat)

    def possible(
        self, plan: Plan, say: Callable[[str], None]
    ) -> Iterator[tuple[Task, int, Arm, Budget | None]]:
        """Yield all cells but those of the baseline whose prompts do not fit."""
        longest = {
            key: max(len(self.encode(question)) for question in questions)
            for key, questions in plan.questions.items()
        }
        for cell in plan.cells():
            task, seed, arm, budget = cell
            if arm is plan.baseline and budget is not None:
                least = longest[task.name, seed] + arm.settings["window"]
                if budget < least:
                    say(
                        f"{task.name}: no {arm.name!r} at {budget}, its longest prompt needs a "
                        f"budget of {least} tokens"
                    )
                    continue
            yield cell

    def run(
        self,
        task: Task,
        seed: int,
        arm: Arm,
        budget: Budget | None,
        questions: Sequence[Question],
        start: int,
    ) -> list[Record]:
        """Answer one batch with a new cache."""
        prompts = [self.encode(each) for each in questions]
        spans = self.spans(questions)
        limits = [each.max_new_tokens or self.settings.max_new_tokens for each in questions]
        self.model.set_attn_implementation(arm.attention)
        batch = answer_batch(
            self.model,
            prompts,
            arm.make(self.model.config, budget, spans, seed),
            max_new_tokens=max(limits),
            temperature=self.settings.temperature,
            # Every batch has its own stream, so that a run that goes on draws what it would have.
            seed=seed * 1_000_003 + start,
            spans=spans,
        )
        records = []
        for question, ids, limit, answer in zip(
            questions, prompts, limits, batch.answers, strict=True
        ):
            tokens = answer.tokens[:limit]
            text = str(self.tokenizer.decode(list(tokens)))
            judgement = task.check(question, text)
            records.append(
                Record(
                    task=task.name,
                    seed=seed,
                    arm=arm.name,
                    budget=budget,
                    question=question.id,
                    digest=_digest(question, arm),
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
                    evicted=batch.evicted,
                    seconds=batch.seconds / len(questions),
                )
            )
        return records

    def spans(self, questions: Sequence[Question]) -> Spans | None:
        """Find the spans of a batch, in the order that each question names them."""
        if not any(question.spans for question in questions):
            return None
        rows, lengths = [], []
        for question in questions:
            content: Any = question.prompt
            if self.settings.chat and isinstance(content, str):
                content = ({"role": "user", "content": content},)
            text = content if isinstance(content, str) else _text(content)
            for span in question.spans:
                if text.count(span) != 1:
                    raise ValueError(
                        f"question {question.id!r}: expected the span {span!r} once in the prompt, "
                        f"got it {text.count(span)} times; give more of its context."
                    )
            if not question.spans:
                raise ValueError(
                    f"question {question.id!r}: expected spans as the other questions of its "
                    "batch have, got none; name them for all questions of a task, or for none."
                )
            found = [
                find_spans(self.tokenizer, [content], substrings=[span]) for span in question.spans
            ]
            rows.append(tuple(each.rows[0][0] for each in found))
            lengths.append(found[0].tokens[0] if found[0].tokens else 0)
        return Spans(tuple(rows), tuple(lengths))


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(str(message["content"]) for message in messages)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _digest(question: Question, arm: Arm) -> str:
    return hashlib.sha256(repr((question, arm)).encode()).hexdigest()[:16]


def _require_same(record: Record, digest: str, path: Path) -> None:
    if record.digest != digest:
        raise ValueError(
            f"{path}: expected the answer to question {record.question!r} with {record.arm!r} to "
            "be of the same question and settings of the cache as now, got others under these "
            "names; choose another file, or other names."
        )
