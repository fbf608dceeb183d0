"""Prompts from JSON lines, with settings of their own, and what is written about each answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_reasoncache.calibration.prompts import Prompt, json_lines
from hf_reasoncache.evaluation.tasks import Question, count_of, prompt_of, texts_of
from hf_reasoncache.generation.sampling import Sampling


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes
    ----------
    id : str
        Of its line.
    sample : int
        Which of the line's answers, from 0.
    seed : int
        With `id` and `sample`, what its random numbers come from.
    text : str
        As the model wrote it, special tokens included, without the end token.
    prompt_tokens, completion_tokens : int
        The end token counts.
    finish_reason : str
        "stop" after an end token, "length" without.
    token_ids : list of int or None
        The completion's, end token included, if asked for.
    """

    id: str
    sample: int
    seed: int
    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    token_ids: list[int] | None

    @property
    def key(self) -> tuple[str, int]:
        """What no two answers of a run have in common."""
        return self.id, self.sample

    def beside(self, line: Line) -> dict[str, Any]:
        """Return the line's own fields and the answer's."""
        ours = dict(vars(self))
        if self.token_ids is None:
            del ours["token_ids"]
        # An id that is a number stays one.
        return line.fields | ours | {"id": line.fields.get("id", self.id)}


LONGEST = 10_000_000
"""Most tokens of an answer: its memory is computed window by window, before any work."""
_SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
_OURS = {*Completion.__dataclass_fields__} - {"id", "seed"}


@dataclass(frozen=True)
class Line:
    """One prompt to answer.

    Attributes
    ----------
    question : Question
        Its id, prompt, and spans.
    ids : tuple of int
        Tokens of the prompt.
    max_new_tokens : int
    sampling : Sampling
    seed : int
    fields : dict
        As the file has them.
    place : str
        File and number, for errors.
    """

    question: Question
    ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    fields: dict[str, Any]
    place: str

    @property
    def id(self) -> str:
        """Unique among the lines."""
        return self.question.id


@dataclass(frozen=True)
class Defaults:
    """Settings where a line has none of its own.

    Attributes
    ----------
    max_new_tokens : int
    sampling : Sampling
    seed : int
    chat : bool
        Whether plain prompts become the message of a user.
    """

    max_new_tokens: int
    sampling: Sampling
    seed: int
    chat: bool


def read_lines(
    path: Path, tokenizer: PreTrainedTokenizerBase, defaults: Defaults, limit: int | None = None
) -> list[Line]:
    """Read the prompts of a file of JSON lines.

    Parameters
    ----------
    path : Path
        Each line is an object with `prompt` (text) or `messages`; and if wanted `id` (by default
        the number of the line), `max_new_tokens`, `temperature`, `top_k`, `top_p`, `seed`, and
        `spans`, parts of the prompt for caches that protect them. Other fields are kept.
    tokenizer : PreTrainedTokenizerBase
    defaults : Defaults
    limit : int, optional
        Take the first so many.

    Raises
    ------
    ValueError
        If a line is not such an object, or two have the same id; names the line.
    FileNotFoundError
        If there is no such file.
    """
    found: dict[str, Line] = {}
    for place, row in json_lines(path):
        if limit is not None and len(found) == limit:
            break
        line = _line(place, row, tokenizer, defaults)
        if line.id in found:
            raise ValueError(
                f"{place}: expected an id of its own, got {line.id!r}, which "
                f"{found[line.id].place} has."
            )
        found[line.id] = line
    return list(found.values())


def digest(lines: Sequence[Line]) -> str:
    """16 hexadecimal digits that identify the content of the lines."""
    about = [
        (line.id, line.ids, line.question.spans, *(line.fields.get(name) for name in _SETTINGS))
        for line in lines
    ]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def _line(
    place: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, defaults: Defaults
) -> Line:
    taken = sorted(_OURS & row.keys())
    if taken:
        raise ValueError(
            f"{place}: expected no field of the names that answers get, got {', '.join(taken)}; "
            "rename it."
        )
    name = row.get("id", place.rpartition(":")[2])
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise ValueError(f"{place}: expected 'id' as text or an integer, got {name!r}.")
    question = Question(str(name), prompt_of(row, place), spans=texts_of(row, "spans", place))
    seed = row.get("seed", defaults.seed)
    if type(seed) is not int or seed < 0:
        raise ValueError(f"{place}: expected 'seed' as an integer >= 0, got {seed!r}.")
    given = {name: row.get(name) for name in _SETTINGS[1:4]}
    try:
        sampling = defaults.sampling.changed(**given)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    new = count_of(row, "max_new_tokens", place) or defaults.max_new_tokens
    if new > LONGEST:
        raise ValueError(f"{place}: max_new_tokens: expected at most {LONGEST:,}, got {new:,}.")
    return Line(
        question=question,
        ids=Prompt(question.prompt, place).encode(tokenizer, chat=defaults.chat),
        max_new_tokens=new,
        sampling=sampling,
        seed=seed,
        fields=row,
        place=place,
    )
