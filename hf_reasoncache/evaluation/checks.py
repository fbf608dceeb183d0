"""Checks of an answer by name, as a suite or a file of questions writes them: data, no code.

Those of the IFEval benchmark are there under `ifeval:` and their names, by the package lm-eval.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any, get_type_hints

from hf_reasoncache.evaluation.patterns import found, require_pattern
from hf_reasoncache.evaluation.patterns import places as all_places
from hf_reasoncache.messages import shown

IFEVAL = "ifeval:"


@dataclass(frozen=True)
class Check:
    """One named check and its arguments.

    Attributes
    ----------
    name : str
        One of `CHECKS`, or `ifeval:` and the name of an instruction of IFEval, such as
        `ifeval:change_case:english_lowercase`.
    arguments : Mapping
        What the check takes besides the answer.

    Raises
    ------
    ValueError
        If there is no such check, or it takes other arguments.
    ModuleNotFoundError
        If the check needs a package that is not installed.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check name and arguments, so that a suite fails before the model runs."""
        if self.name.startswith(IFEVAL):
            _ifeval(self.name.removeprefix(IFEVAL), self.arguments)
            return
        if self.name not in CHECKS:
            raise ValueError(
                f"check: expected one of {', '.join(CHECKS)} or {IFEVAL}..., got "
                f"{shown(self.name)}."
            )
        if self.name == "math":
            _math_verify()
        try:
            self._require_arguments()
        except ValueError as error:
            raise ValueError(f"check {self.name!r}: {error}.") from error

    def _require_arguments(self) -> None:
        function = CHECKS[self.name]
        try:
            inspect.signature(function).bind("", **self.arguments)
        except TypeError as error:
            raise ValueError(
                f"expected the arguments that it takes, got {shown(dict(self.arguments))}: "
                f"{shown(error)}"
            ) from error
        kinds = get_type_hints(function)
        for name, value in self.arguments.items():
            if isinstance(value, bool) or not isinstance(value, kinds[name]):
                wanted = "text" if kinds[name] is str else "an integer"
                raise ValueError(f"expected {name} as {wanted}, got {shown(value)}")
            if name in ("pattern", "places"):
                require_pattern(value)

    @staticmethod
    def of(value: object) -> Check:
        """Make a check of JSON: a name, or an object of `name` and arguments.

        Raises
        ------
        ValueError
            If it is neither, or not a check.
        """
        if isinstance(value, str):
            return Check(value)
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ValueError(
                f"check: expected a name or an object with a name, got {shown(value)}."
            )
        return Check(value["name"], {key: v for key, v in value.items() if key != "name"})

    def __call__(self, answer: str) -> bool:
        """Whether an answer passes.

        Raises
        ------
        ValueError
            If a pattern takes too long on it.
        """
        if self.name.startswith(IFEVAL):
            instruction = _ifeval(self.name.removeprefix(IFEVAL), self.arguments)
            return bool(answer.strip()) and bool(instruction.check_following(answer))
        return CHECKS[self.name](answer, **self.arguments)


def contains(answer: str, text: str, at_least: int = 1) -> bool:
    """Whether a text occurs at least so many times; case does not count."""
    return answer.casefold().count(text.casefold()) >= at_least


def excludes(answer: str, text: str) -> bool:
    """Whether a text does not occur; case does not count."""
    return not contains(answer, text)


def matches(answer: str, pattern: str) -> bool:
    """Whether a regular expression is found; a dot matches line breaks too."""
    return found(pattern, answer)


def wherever(answer: str, places: str, pattern: str, at_least: int = 1) -> bool:
    """Whether a pattern is found in all matches of another one, of which there are enough."""
    texts = all_places(places, answer)
    return len(texts) >= at_least and all(found(pattern, text) for text in texts)


def starts_with(answer: str, text: str) -> bool:
    """Whether the answer begins with a text, after whitespace."""
    return answer.strip().startswith(text)


def ends_with(answer: str, text: str) -> bool:
    """Whether the answer ends with a text, before whitespace."""
    return answer.strip().endswith(text)


def words(answer: str, at_least: int = 0, at_most: int | None = None) -> bool:
    """Whether the number of words, separated by whitespace, is within bounds."""
    count = len(answer.split())
    return count >= at_least and (at_most is None or count <= at_most)


def bullets(answer: str, count: int) -> bool:
    """Whether exactly `count` lines begin with `*` or `-`."""
    return len(re.findall(r"^\s*[*-]\s", answer, re.MULTILINE)) == count


def lowercase(answer: str) -> bool:
    """Whether there are letters, and no capital ones."""
    return answer.islower()


def uppercase(answer: str) -> bool:
    """Whether there are letters, and only capital ones."""
    return answer.isupper()


def is_json(answer: str) -> bool:
    """Whether the answer is JSON, a Markdown fence around it aside, as far as Python reads it."""
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", answer.strip())
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def final_answer(answer: str, expected: str) -> bool:
    r"""Whether the last `\boxed{}`, or without one the last number, is the expected answer.

    Numbers are compared by value, anything else as text without blanks.
    """
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", answer)
    given = boxed or re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
    return bool(given) and _value(given[-1]) == _value(expected)


def math(answer: str, expected: str) -> bool:
    """Whether the answer is the expected one by the package math-verify, as an expression."""
    package = _math_verify()
    return bool(package.verify(package.parse(expected), package.parse(answer)))


CHECKS: dict[str, Callable[..., bool]] = {
    "contains": contains,
    "excludes": excludes,
    "matches": matches,
    "wherever": wherever,
    "starts_with": starts_with,
    "ends_with": ends_with,
    "words": words,
    "bullets": bullets,
    "lowercase": lowercase,
    "uppercase": uppercase,
    "json": is_json,
    "final_answer": final_answer,
    "math": math,
}


def _value(text: str) -> Decimal | str:
    plain = re.sub(r"[\s,$]", "", text)
    try:
        number = Decimal(plain)
    except InvalidOperation:
        return plain
    # NaN equals no number, not even itself, so it is compared as text.
    return number if number.is_finite() else plain


def _math_verify() -> Any:
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise _missing("math", "math-verify") from error
    return math_verify


def _ifeval(name: str, arguments: Mapping[str, Any]) -> Any:
    """Return an instruction of IFEval with its arguments."""
    registry = _ifeval_registry()
    if name not in registry:
        raise ValueError(f"check: expected an instruction of IFEval, got {shown(name)}.")
    instruction = registry[name](name)
    # The package's own checks of arguments are few; what it raises is of any kind.
    try:
        instruction.build_description(**arguments)
    except Exception as error:
        raise ValueError(
            f"check '{IFEVAL}{name}': expected the arguments of this instruction, got "
            f"{shown(dict(arguments))}: {shown(error)}."
        ) from error
    return instruction


@cache
def _ifeval_registry() -> dict[str, Any]:
    try:
        from lm_eval.tasks.ifeval import instructions_registry
    except ModuleNotFoundError as error:
        raise _missing("ifeval:...", error.name or "lm-eval") from error
    registry: dict[str, Any] = instructions_registry.INSTRUCTION_DICT
    return registry


def _missing(check: str, package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"check {check!r}: expected the package {package}, got no such module; pip install "
        "'hf-reasoncache[eval]'.",
        name=package,
    )
