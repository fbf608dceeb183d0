"""Problems with long chains of thought, and their checker: words in, words out.

Three tasks, each answered by a single digit after a chain of thought:

``chain``
    Follow several chains of definitions, record each result, sum the records.
``walk``
    Run a small machine for a number of steps.
``instr``
    The same with five standing instructions; following is scored at every place that calls for one.

Seeds are split for good: a number measured on `TEST_SEEDS` must never have steered a choice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise

from .families import TASKS, get_family
from .generators import Writer, is_triggered

#: Seeds of training runs; `make_problems` never draws from their streams, whatever its seed.
TRAINING_SEEDS = range(1000)
#: Seeds for every choice: defaults, thresholds, which of two methods to keep.
DEVELOPMENT_SEEDS = range(1000, 2000)
#: Seeds for the figures that are reported, and for nothing else.
TEST_SEEDS = range(2000, 3000)

DEFAULT_FAMILY = "qwen3"


@dataclass(frozen=True)
class Problem:
    """A problem to hand to a model."""

    task: str
    """``chain``, ``walk`` or ``instr``."""
    prompt: str
    """From ``<bos>`` to ``<think>``; tokenize it as it is, without adding special tokens."""
    answer: str
    """The true answer, one digit."""
    solution: str
    """A completion the checker accepts, ending in ``<eos>``."""
    instructions: dict[str, str] = field(default_factory=dict)
    """Standing instructions (``instr`` only): directive to the word it asks for."""
    family: str = DEFAULT_FAMILY
    """The family whose model understands the prompt."""
    max_new_tokens: int = 512
    """A generous limit on the length of a completion."""


@dataclass(frozen=True)
class Outcome:
    """What a completion achieved."""

    correct: bool
    """The answer is the true one."""
    finished: bool
    """There is an answer."""
    followed: dict[str, list[bool]]
    """Per directive, one entry for every place that called for its word; ``FINAL`` has just one."""
    length: int
    """Words of the completion, without ``<eos>`` and ``<pad>``."""


def make_problems(task: str, count: int, seed: int, family: str = DEFAULT_FAMILY) -> list[Problem]:
    """Return `count` problems; those of a smaller count with the same seed come first.

    Parameters
    ----------
    task
        ``chain``, ``walk`` or ``instr``.
    count
        How many.
    seed
        See `DEVELOPMENT_SEEDS` and `TEST_SEEDS`.
    family
        ``llama`` or ``qwen3``: which model the problems are for.

    Raises
    ------
    ValueError
        Unknown task or family, or a negative count.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task: expected one of {list(TASKS)}, got {task!r}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    dialect = get_family(family)
    writer = Writer(dialect, random.Random(f"{family}/{task}/{seed}"))
    problems = []
    for _ in range(count):
        draft = (
            writer.chain(dialect.chain) if task == "chain" else writer.walk(getattr(dialect, task))
        )
        problems.append(
            Problem(
                task=task,
                prompt=" ".join(draft.prompt),
                answer=draft.answer,
                solution=" ".join(draft.solution),
                instructions=draft.instructions,
                family=family,
                max_new_tokens=dialect.max_new_tokens[task],
            )
        )
    return problems


def read_answer(completion: str) -> str | None:
    """Return the word after the first ``ANS``, or None where the completion has no answer."""
    words = _content(completion)
    if "ANS" not in words:
        return None
    place = words.index("ANS") + 1
    return words[place] if place < len(words) else None


def check(problem: Problem, completion: str) -> Outcome:
    """Judge a completion.

    Parameters
    ----------
    problem
        What was asked.
    completion
        What the model wrote after the prompt; anything from the first ``<eos>`` or ``<pad>`` on is
        ignored.

    Returns
    -------
    Outcome
        An instruction is judged at the places the completion itself reaches: a chain of thought
        that breaks off early has fewer of them.
    """
    words = _content(completion)
    answer = read_answer(completion)
    return Outcome(
        correct=answer == problem.answer,
        finished=answer is not None,
        followed=_followed(problem.instructions, words),
        length=len(words),
    )


def _content(completion: str) -> list[str]:
    words = completion.split()
    ends = [words.index(end) for end in ("<eos>", "<pad>") if end in words]
    return words[: min(ends, default=len(words))]


def _followed(instructions: dict[str, str], words: list[str]) -> dict[str, list[bool]]:
    followed: dict[str, list[bool]] = {directive: [] for directive in instructions}
    end = words.index("</think>") if "</think>" in words else len(words)
    starts = [place for place, word in enumerate(words[:end]) if word.startswith("#")]
    for start, stop in pairwise([*starts, end]):
        step = words[start:stop]
        # A step reads "#k node addend accumulator ..." in both families.
        accumulator = step[3] if len(step) > 3 else ""
        if not (step[0][1:].isdigit() and accumulator.isdigit()):
            continue
        for directive, word in instructions.items():
            if is_triggered(directive, int(step[0][1:]), int(accumulator)):
                followed[directive].append(_says(step, directive, word))
    if "FINAL" in instructions:
        followed["FINAL"].append(_says(words[end:], "FINAL", instructions["FINAL"]))
    return followed


def _says(words: list[str], directive: str, word: str) -> bool:
    return (directive, word) in pairwise(words)
