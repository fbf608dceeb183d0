"""Checks of values that come from a profile's file or from its maker.

Every function takes the name of the field, returns the value in its own type, or raises ValueError
saying what was expected and got.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from hf_reasoncache.messages import shown

_DEEPEST = 32  # levels of nested JSON, so that what recurses later, as `repr`, cannot fail


def refuse(name: str, expected: str, got: object) -> NoReturn:
    """Raise the ValueError, without what a file could do to a terminal."""
    raise ValueError(f"{name}: expected {expected}, got {shown(got)}.")


def text(name: str, value: object) -> str:
    """Printable text: a name that reaches a terminal must not move its cursor."""
    if not isinstance(value, str) or not value or not value.isprintable():
        refuse(name, "printable text", value)
    return value


def optional_text(name: str, value: object) -> str | None:
    """Printable text or None."""
    return None if value is None else text(name, value)


def matching(name: str, value: object, pattern: str, meaning: str) -> str:
    """Text that matches a regular expression as a whole."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        refuse(name, meaning, value)
    return value


def count(name: str, value: object) -> int:
    """An integer from 0 to 2**63 - 1."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        refuse(name, "an integer >= 0", value)
    return value


def sequence(name: str, value: object, meaning: str, length: int | None = None) -> Sequence[Any]:
    """A list or a tuple, of `length` elements where that is given."""
    if not isinstance(value, list | tuple):
        refuse(name, meaning, value)
    if length is not None and len(value) != length:
        refuse(name, f"{meaning}, {shown(length)} of them", f"{len(value)} elements")
    return value


def amounts(name: str, value: object, length: int) -> tuple[float, ...]:
    """`length` finite numbers >= 0."""
    meaning = "finite numbers >= 0"
    result = []
    for index, entry in enumerate(sequence(name, value, meaning, length)):
        if not isinstance(entry, int | float) or isinstance(entry, bool):
            refuse(f"{name}[{index}]", "a finite number >= 0", entry)
        # An integer beyond the range of float compares without an OverflowError.
        if not 0 <= entry < math.inf or entry > 1e300:
            refuse(f"{name}[{index}]", "a finite number >= 0 and <= 1e300", entry)
        result.append(float(entry))
    return tuple(result)


def plain_json(name: str, value: object) -> dict[str, Any]:
    """A mapping that JSON can hold, with printable text and finite numbers, in plain types."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        refuse(name, "a mapping from text to JSON values", value)
    try:
        plain = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected JSON values, finite, got: {shown(error)}.") from error
    for each in everything_in(name, plain):
        if isinstance(each, str) and not each.isprintable():
            refuse(name, "printable text", each)
    return plain


def everything_in(name: str, value: object) -> Iterator[object]:
    """Yield keys and values of a JSON value at every level, without recursion.

    Raises
    ------
    ValueError
        If there are more levels than anything we read has.
    """
    level = [value]
    for _ in range(_DEEPEST):
        yield from level
        inner: list[object] = []
        for each in level:
            if isinstance(each, dict):
                inner += [*each, *each.values()]
            elif isinstance(each, list):
                inner += each
        if not inner:
            return
        level = inner
    raise ValueError(f"{name}: expected at most {_DEEPEST} levels of JSON, got more.")


def fields(cls: type, name: str, value: object) -> dict[str, Any]:
    """Keep what `cls`, a dataclass, knows of a JSON object; what it must have has to be there."""
    if not isinstance(value, dict):
        refuse(name, "a JSON object", value)
    known = dataclasses.fields(cls)
    for field in known:
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            raise ValueError(f"{name}: expected the field {field.name!r}, got none.")
    return {field.name: value[field.name] for field in known if field.name in value}


def assign(instance: object, **values: object) -> None:
    """Set fields of a frozen dataclass to their checked values, in its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def parse(name: str, data: bytes) -> dict[str, Any]:
    """Read a JSON object: UTF-8, numbers finite, no key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return result

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"a number that is not finite: {number[:20]}")
        return value

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=finite,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected JSON, got something else: {shown(error)}.") from error
    # Walks it all, for the depth.
    deque(everything_in(name, value), maxlen=0)
    if not isinstance(value, dict):
        refuse(name, "a JSON object", value)
    return value
