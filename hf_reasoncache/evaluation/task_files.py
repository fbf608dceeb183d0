"""Tasks by name: files of questions, and tasks of other modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_reasoncache.calibration.prompts import json_lines
from hf_reasoncache.evaluation.checks import Check
from hf_reasoncache.evaluation.plugins import ForeignTask
from hf_reasoncache.evaluation.tasks import Judgement, Question, Task, count_of, prompt_of, texts_of
from hf_reasoncache.messages import shown


@dataclass(frozen=True)
class FileTask:
    """Questions from a file of JSON lines; `load_task` reads it.

    Attributes
    ----------
    name : str
    items : tuple of Question
    checks : Mapping of str to Check
        By the question's id.
    """

    name: str
    items: tuple[Question, ...]
    checks: Mapping[str, Check]

    def questions(self, seed: int) -> Sequence[Question]:
        """Return the questions of the file, whatever the seed."""
        return self.items

    def check(self, question: Question, answer: str) -> Judgement:
        """Judge by the question's check."""
        return Judgement(self.checks[question.id](answer))


def load_task(source: str) -> Task:
    """Read a file of questions, or find a task in a Python module.

    Parameters
    ----------
    source : str
        A `.jsonl` file, each line an object with `prompt` (or `messages`) and either `check`, see
        `Check`, or `answer`, which is checked by `final_answer`; `id`, `max_new_tokens` and `spans`
        if wanted. Or `module:name` of a `Task`, or of a function that makes one.

    Raises
    ------
    ValueError
        If the file is not such a file (it names the line), or the name is not a task.
    FileNotFoundError
        If there is no such file.
    """
    if source.endswith(".jsonl"):
        return _read(Path(source))
    return ForeignTask(source)


def _read(path: Path) -> FileTask:
    items: dict[str, Question] = {}
    checks = {}
    for place, row in json_lines(path):
        name = str(row.get("id", place.rpartition(":")[2]))
        if name in items:
            raise ValueError(f"{place}: expected an id of its own, got {shown(name)} again.")
        if "check" not in row and "answer" not in row:
            raise ValueError(
                f"{place}: expected a field 'check' or 'answer', got {shown(sorted(row))}."
            )
        try:
            checks[name] = Check.of(row["check"]) if "check" in row else _expects(row["answer"])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        items[name] = Question(
            id=name,
            prompt=prompt_of(row, place),
            max_new_tokens=count_of(row, "max_new_tokens", place),
            spans=texts_of(row, "spans", place),
        )
    return FileTask(path.stem, tuple(items.values()), checks)


def _expects(answer: object) -> Check:
    """Return the check of a line without one: text, or a number."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"expected 'answer' as text or a number, got {shown(answer)}.")
    return Check("final_answer", {"expected": str(answer)})
