"""Suites of several instructions in one prompt, as an audit asks them: together, alone, in orders.

The measures are those of "The Pitfalls of KV Cache Compression" (arXiv 2510.00231). Ours: the file
format, the slots, and that an instruction alone is compared on the very same prompt without the
others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_reasoncache.calibration.prompts import Message, json_lines
from hf_reasoncache.evaluation.checks import Check
from hf_reasoncache.evaluation.rouge import rouge_l_recall
from hf_reasoncache.evaluation.tasks import (
    Judgement,
    Question,
    count_of,
    prompt_of,
    texts_of,
)
from hf_reasoncache.messages import shown

SLOT = "[[instruction]]"


@dataclass(frozen=True)
class Instruction:
    """One thing that a prompt asks for.

    Attributes
    ----------
    name : str
        Its class: instructions of the same name are counted together.
    text : str
        As it stands in the prompt.
    check : Check
        Whether an answer follows it.
    """

    name: str
    text: str
    check: Check


@dataclass(frozen=True)
class Case:
    """A prompt with several instructions.

    Attributes
    ----------
    id : str
    prompt : str or tuple of dict
        Text or messages with `[[instruction]]` where instructions go: once for each, or once for
        all, one per line.
    instructions : tuple of Instruction
    orders : tuple of tuple of int
        In which orders they are asked together; each is a permutation.
    protected : str or None
        A text of the prompt that an answer must not give away.
    correct : Check or None
        Of the answer itself.
    max_new_tokens : int or None
    alone : bool
        Whether each instruction is also asked without the others.
    """

    id: str
    prompt: str | tuple[Message, ...]
    instructions: tuple[Instruction, ...]
    orders: tuple[tuple[int, ...], ...]
    protected: str | None = None
    correct: Check | None = None
    max_new_tokens: int | None = None
    alone: bool = True

    def __post_init__(self) -> None:
        """Check that everything fits together; raises ValueError."""
        names = [each.name for each in self.instructions]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"instructions: expected names of their own, got {shown(names)}.")
        slots = sum(text.count(SLOT) for text in _texts(self.prompt))
        if slots not in (1, len(names)):
            raise ValueError(
                f"prompt: expected {SLOT} once, or once for each of {len(names)} instructions, got "
                f"it {slots} times."
            )
        for order in self.orders:
            whole = all(type(place) is int for place in order)
            if not whole or sorted(order) != list(range(len(names))):
                raise ValueError(
                    f"orders: expected permutations of 0 to {len(names) - 1}, got {shown(order)}."
                )
        if not self.orders or len(set(self.orders)) != len(self.orders):
            raise ValueError(
                f"orders: expected at least one, no two alike, got {shown(self.orders)}."
            )
        if self.protected and not any(self.protected in text for text in _texts(self.prompt)):
            raise ValueError(
                f"protected: expected a text of the prompt, got {shown(self.protected)}."
            )
        if self.protected is not None:
            # Leakage is counted in words.
            rouge_l_recall(self.protected, "")

    def questions(self) -> list[Question]:
        """All instructions in each order, then each alone, where it stands in the first order."""
        count = len(self.instructions)
        alone = [(place,) for place in range(count)] if self.alone and count > 1 else []
        return [
            *(self._question(order, order) for order in self.orders),
            *(self._question(self.orders[0], places) for places in alone),
        ]

    def _question(self, order: tuple[int, ...], asked: tuple[int, ...]) -> Question:
        texts = [self.instructions[place].text for place in asked]
        slots = [self.instructions[place].text if place in asked else "" for place in order]
        return Question(
            id=f"{self.id}/{'-'.join(map(str, asked))}",
            prompt=_fill(self.prompt, slots),
            max_new_tokens=self.max_new_tokens,
            spans=(*texts, *([self.protected] if self.protected else [])),
        )

    def check(self, places: Sequence[int], answer: str) -> Judgement:
        """Judge an answer to the instructions at these places."""
        asked = [self.instructions[place] for place in places]
        return Judgement(
            correct=None if self.correct is None else self.correct(answer),
            followed={each.name: each.check(answer) for each in asked},
            leakage=None if self.protected is None else rouge_l_recall(self.protected, answer),
        )


@dataclass(frozen=True)
class Suite:
    """A task of cases; see `load_suite` for the file.

    Attributes
    ----------
    name : str
    cases : tuple of Case
    """

    name: str
    cases: tuple[Case, ...]

    @cached_property
    def by_id(self) -> Mapping[str, Case]:
        """The cases by their ids."""
        return {case.id: case for case in self.cases}

    @property
    def classes(self) -> list[str]:
        """Names of the instructions, in the order of their first appearance."""
        return list(dict.fromkeys(each.name for case in self.cases for each in case.instructions))

    def questions(self, seed: int) -> list[Question]:
        """Return the questions of all cases, whatever the seed."""
        return [question for case in self.cases for question in case.questions()]

    def check(self, question: Question, answer: str) -> Judgement:
        """Judge an answer by the checks of its case."""
        case, places = self.locate(question.id)
        return case.check(places, answer)

    def locate(self, question_id: str) -> tuple[Case, tuple[int, ...]]:
        """Return the case of a question, and the places of its instructions in their order."""
        case, _, places = question_id.rpartition("/")
        return self.by_id[case], tuple(map(int, places.split("-")))


def load_suite(path: Path, limit: int | None = None) -> Suite:
    """Read a suite of JSON lines.

    Parameters
    ----------
    path : Path
        Each line is an object with `prompt` (or `messages`) and `instructions`, a list of objects
        with `name`, `text` and `check`; and if wanted `id`, `orders` (by default as written and
        reversed), `alone` (true by default), `protected`, `check` (of the answer itself) and
        `max_new_tokens`. See `Case`.
    limit : int, optional
        Take the first cases.

    Raises
    ------
    ValueError
        If the file is not such a file; names the line.
    FileNotFoundError
        If there is no such file.
    """
    cases: dict[str, Case] = {}
    for place, row in json_lines(path):
        if limit is not None and len(cases) == limit:
            break
        case = _case(row, place)
        if case.id in cases:
            raise ValueError(f"{place}: expected an id of its own, got {shown(case.id)} again.")
        cases[case.id] = case
    return Suite(path.stem, tuple(cases.values()))


def _case(row: dict[str, Any], place: str) -> Case:
    listed = row.get("instructions")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{place}: expected 'instructions' as a list, got {shown(listed)}.")
    try:
        instructions = tuple(_instruction(each) for each in listed)
        protected = row.get("protected")
        return Case(
            id=str(row.get("id", place.rpartition(":")[2])),
            prompt=prompt_of(row, place),
            instructions=instructions,
            orders=_orders(row, len(instructions)),
            protected=texts_of({"protected": [protected]}, "protected", place)[0]
            if protected is not None
            else None,
            correct=Check.of(row["check"]) if "check" in row else None,
            max_new_tokens=count_of(row, "max_new_tokens", place),
            alone=_flag(row.get("alone", True)),
        )
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(place) else f"{place}: {text}") from error


def _orders(row: dict[str, Any], count: int) -> tuple[tuple[int, ...], ...]:
    """Return the orders of a line: by default as written, and reversed."""
    usual = tuple(range(count))
    listed = row.get("orders", [*dict.fromkeys((usual, usual[::-1]))])
    if not isinstance(listed, list) or not all(isinstance(each, list | tuple) for each in listed):
        raise ValueError(f"orders: expected lists of integers, got {shown(listed)}.")
    return tuple(map(tuple, listed))


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"alone: expected true or false, got {shown(value)}.")
    return value


def _instruction(value: object) -> Instruction:
    fields = value if isinstance(value, Mapping) else {}
    name, text = fields.get("name"), fields.get("text")
    if not isinstance(name, str) or not isinstance(text, str) or not text or "check" not in fields:
        raise ValueError(
            f"instructions: expected name, text and check of each, got {shown(value)}."
        )
    return Instruction(name, text, Check.of(fields["check"]))


def _texts(prompt: str | tuple[Message, ...]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [str(each["content"]) for each in prompt]


def _fill(prompt: str | tuple[Message, ...], texts: Sequence[str]) -> str | tuple[Message, ...]:
    """Put texts, which may be empty, into the slots; all of them into a single one."""
    slots = sum(text.count(SLOT) for text in _texts(prompt))
    fillers = iter(["\n".join(filter(None, texts))] if slots == 1 else texts)

    def filled(text: str) -> str:
        first, *rest = text.split(SLOT)
        return first + "".join(next(fillers) + part for part in rest)

    if isinstance(prompt, str):
        return filled(prompt)
    return tuple({**each, "content": filled(each["content"])} for each in prompt)
