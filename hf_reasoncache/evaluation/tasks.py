"""What is asked and how an answer is judged: tasks from files, or any object of the protocol."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hf_reasoncache.calibration.prompts import Message, json_lines
from hf_reasoncache.evaluation.checks import Check
from hf_reasoncache.messages import shown


@dataclass(frozen=True)
class Question:
    """One prompt to answer.

    Attributes
    ----------
    id : str
        Tells it from the other questions of its task.
    prompt : str or tuple of dict
        Text, or the messages of a conversation.
    max_new_tokens : int or None
        Longest answer, where that is not the same for all.
    spans : tuple of str
        Parts of the prompt that matter, each once in it: what is held of them is recorded, and an
        arm may protect them.
    """

    id: str
    prompt: str | tuple[Message, ...]
    max_new_tokens: int | None = None
    spans: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """What an answer is worth.

    Attributes
    ----------
    correct : bool or None
        None where the question has no right answer.
    followed : Mapping of str to bool
        Instructions, by name.
    leakage : float or None
        Share of a protected text that the answer gives away.
    """

    correct: bool | None
    followed: Mapping[str, bool] = field(default_factory=dict)
    leakage: float | None = None


@runtime_checkable
class Task(Protocol):
    """Questions and their checker."""

    @property
    def name(self) -> str:
        """Tells the task from the others of a run."""
        ...

    def questions(self, seed: int) -> Sequence[Question]:
        """Return the questions; a task that draws them draws others with another seed."""
        ...

    def check(self, question: Question, answer: str) -> Judgement:
        """Judge what the model wrote, up to where it ended."""
        ...


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
    found = plugin(source, "--task: expected FILE.jsonl or module:name of a task")
    # A class has all that its objects have.
    if isinstance(found, type) or (callable(found) and not isinstance(found, Task)):
        found = found()
    if not isinstance(found, Task):
        raise ValueError(f"{source}: expected an evaluation.Task, got {type(found).__name__}.")
    return found


def plugin(source: str, expected: str) -> Any:
    """Import `module:name`; ValueError where there is none."""
    module, colon, name = source.partition(":")
    if not colon:
        raise ValueError(f"{expected}, got {shown(source)}.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{expected}, got {shown(source)}: {error}.") from error


def _read(path: Path) -> FileTask:
    items: dict[str, Question] = {}
    checks = {}
    for place, row in json_lines(path):
        name = str(row.get("id", place.rpartition(":")[2]))
        if name in items:
            raise ValueError(f"{place}: expected an id of its own, got {shown(name)} again.")
        if "check" not in row and "answer" not in row:
            raise ValueError(f"{place}: expected a field 'check' or 'answer', got {sorted(row)}.")
        check = row.get("check", {"name": "final_answer", "expected": str(row.get("answer"))})
        try:
            checks[name] = Check.of(check)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        items[name] = Question(
            id=name,
            prompt=prompt_of(row, place),
            max_new_tokens=count_of(row, "max_new_tokens", place),
            spans=texts_of(row, "spans", place),
        )
    return FileTask(path.stem, tuple(items.values()), checks)


def prompt_of(row: Mapping[str, Any], place: str) -> str | tuple[Message, ...]:
    """Return the prompt of a line: text, or messages.

    Raises
    ------
    ValueError
        If it has neither.
    """
    value = row.get("messages", row.get("prompt"))
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(_is_message(each) for each in value):
        return tuple(dict(each) for each in value)
    raise ValueError(
        f"{place}: expected 'prompt' as text, or 'messages' with role and content, got "
        f"{ascii(value)[:80]}."
    )


def texts_of(row: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    """Return a field that is a list of texts, empty by default; ValueError for anything else."""
    value = row.get(name, [])
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise ValueError(f"{place}: expected {shown(name)} as a list of texts, got {shown(value)}.")
    return tuple(value)


def count_of(row: Mapping[str, Any], name: str, place: str) -> int | None:
    """Return a field that is a positive integer, None by default; ValueError for anything else."""
    value = row.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{place}: expected {shown(name)} as an integer >= 1, got {shown(value)}.")
    return value


def _is_message(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
