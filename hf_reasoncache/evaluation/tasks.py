"""What is asked and how an answer is judged: tasks from files, or any object of the protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from hf_reasoncache.arguments import require_int, require_share
from hf_reasoncache.calibration.prompts import Message, require_unicode
from hf_reasoncache.messages import shown


@dataclass(frozen=True)
class Question:
    """One prompt to answer.

    Attributes
    ----------
    id : str
        Unique within the task.
    prompt : str or tuple of dict
        Text, or the messages of a conversation.
    max_new_tokens : int or None
        Longest answer, where that is not the same for all.
    spans : tuple of str
        Parts of the prompt that matter, each once in it: what is held of them is recorded, and a
        cache may protect them.
    """

    id: str
    prompt: str | tuple[Message, ...]
    max_new_tokens: int | None = None
    spans: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check; raises ValueError."""
        if not isinstance(self.id, str):
            raise ValueError(f"question: expected an id that is text, got {shown(self.id)}.")
        place = f"question {shown(self.id)}"
        require_unicode(place, self.id)
        prompt_of({"prompt": self.prompt}, place)
        if self.max_new_tokens is not None:
            require_int(f"{place}: max_new_tokens", self.max_new_tokens, low=1)
        object.__setattr__(self, "spans", texts_of({"spans": self.spans}, "spans", place))


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

    def __post_init__(self) -> None:
        """Turn what counts as true, a number or text elsewhere (NumPy) into Python's own."""
        if self.correct is not None:
            object.__setattr__(self, "correct", bool(self.correct))
        followed = {str(name): bool(value) for name, value in self.followed.items()}
        object.__setattr__(self, "followed", followed)
        if self.leakage is not None:
            object.__setattr__(self, "leakage", float(self.leakage))
            require_share("leakage", self.leakage)


@runtime_checkable
class Task(Protocol):
    """Questions and their checker."""

    @property
    def name(self) -> str:
        """Unique within a run."""
        ...

    def questions(self, seed: int) -> Sequence[Question]:
        """Return the questions; a task that draws them draws others with another seed."""
        ...

    def check(self, question: Question, answer: str) -> Judgement:
        """Judge what the model wrote, up to where it ended."""
        ...


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
    if isinstance(value, list | tuple) and value and all(_is_message(each) for each in value):
        return tuple(dict(each) for each in value)
    raise ValueError(
        f"{place}: expected 'prompt' as text, or 'messages' with role and content, got "
        f"{shown(value)}."
    )


def texts_of(row: Mapping[str, Any], name: str, place: str) -> tuple[str, ...]:
    """Return a field that is a list of texts, empty by default; ValueError for anything else."""
    value = row.get(name, [])
    lists = isinstance(value, list | tuple)
    if not lists or not all(isinstance(each, str) and each for each in value):
        raise ValueError(f"{place}: expected {shown(name)} as a list of texts, got {shown(value)}.")
    return tuple(value)


def count_of(row: Mapping[str, Any], name: str, place: str) -> int | None:
    """Return a field that is a positive integer, None by default; ValueError for anything else."""
    value = row.get(name)
    if value is not None:
        require_int(f"{place}: {name}", value, low=1)
    return value


def _is_message(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
