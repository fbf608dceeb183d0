"""Tasks of user modules; what they raise becomes a ValueError that names the place."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_reasoncache.evaluation.tasks import Judgement, Question, Task
from hf_reasoncache.messages import shown


class ForeignTask:
    """A task found by its name, `module:name`; what it raises is a ValueError.

    Parameters
    ----------
    source : str
        `module:name` of a `Task`, or of a function that makes one.

    Raises
    ------
    ValueError
        If there is no such task, or its module or function raises.
    """

    def __init__(self, source: str) -> None:
        self.source = shown(source)
        with _foreign(f"--task {self.source}: expected FILE.jsonl or module:name of a task"):
            module, _, name = source.partition(":")
            found = getattr(importlib.import_module(module), name)
            # A class has the attributes of its objects, so it would pass for a task.
            if isinstance(found, type) or (callable(found) and not isinstance(found, Task)):
                found = found()
        if not isinstance(found, Task) or not isinstance(found.name, str):
            raise ValueError(
                f"{self.source}: expected an evaluation.Task with a name, got "
                f"{type(found).__name__}."
            )
        self.task: Any = found

    @property
    def name(self) -> str:
        """See `Task.name`."""
        return str(self.task.name)

    def questions(self, seed: int) -> Sequence[Question]:
        """See `Task.questions`; raises ValueError."""
        with _foreign(f"{self.source}: expected questions of seed {seed}"):
            found = tuple(self.task.questions(seed))
        for each in found:
            if not isinstance(each, Question):
                raise ValueError(f"{self.source}: expected Question objects, got {shown(each)}.")
        return found

    def check(self, question: Question, answer: str) -> Judgement:
        """See `Task.check`; raises ValueError."""
        with _foreign(f"{self.source}: expected a judgement of question {shown(question.id)}"):
            found = self.task.check(question, answer)
        if not isinstance(found, Judgement):
            raise ValueError(f"{self.source}: expected a Judgement, got {shown(found)}.")
        return found


@contextmanager
def _foreign(expected: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        raise ValueError(
            f"{expected}, got {type(error).__name__}: {shown(error)} ({place})."
        ) from error
