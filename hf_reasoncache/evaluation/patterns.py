"""Regular expressions of suites: Python's own, with a bound on the time and memory they take."""

from __future__ import annotations

import re

import regex

from hf_reasoncache.messages import shown

SECONDS = 10.0
"""For one answer."""

_PROBE_SECONDS = 1.0
_PROBES = 12
_LARGEST = 100_000
"""Copies that repetitions make of a part of a pattern; the package regex writes them out."""

_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|(?P<open>\()|(?P<close>\))"
    r"|(?P<times>\{(?P<low>\d*),?(?P<high>\d*)\})|(?P<plus>\+)|.",
    re.DOTALL,
)


def require_pattern(pattern: str) -> None:
    """Raise ValueError unless a pattern is valid and fast on texts that may lead it astray."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"expected a regular expression, got {shown(pattern)}: {shown(error)}"
        ) from error
    copies = _copies(pattern)
    if copies > _LARGEST:
        raise ValueError(
            f"expected repetitions that come to at most {_LARGEST:,} copies of a part, got "
            f"{shown(copies)} in {shown(pattern)}"
        )
    letters = dict.fromkeys([*filter(str.isalnum, pattern), "a", "0", " "])
    for letter in [*letters][:_PROBES]:
        _search(pattern, 40 * letter + "\0", _PROBE_SECONDS)


def found(pattern: str, text: str) -> bool:
    """Whether a pattern is found; a dot matches line breaks too.

    Raises
    ------
    ValueError
        If that takes too long.
    """
    return _search(pattern, text, SECONDS)


def places(pattern: str, text: str) -> list[str]:
    """Return all that a pattern finds; raises ValueError as `found`."""
    try:
        hits = regex.finditer(pattern, text, regex.DOTALL, timeout=SECONDS)
        return [hit.group() for hit in hits]
    except TimeoutError as error:
        raise _too_slow(pattern, text, SECONDS) from error


def _search(pattern: str, text: str, seconds: float) -> bool:
    try:
        return regex.search(pattern, text, regex.DOTALL, timeout=seconds) is not None
    except TimeoutError as error:
        raise _too_slow(pattern, text, seconds) from error


def _too_slow(pattern: str, text: str, seconds: float) -> ValueError:
    return ValueError(
        f"expected a pattern that is through with {len(text)} characters in {seconds:g} s, got "
        f"{shown(pattern)}, which tries too many ways to match; write it so that each text matches "
        "in one way"
    )


def _copies(pattern: str) -> int:
    """Return the largest product of repetitions inside each other."""
    inside, last = [1], 1
    for token in _TOKEN.finditer(pattern):
        if token["open"]:
            inside.append(1)
        elif token["close"] and len(inside) > 1:
            last = inside.pop()
        elif token["times"]:
            last *= max(int(token["low"] or 1), int(token["high"] or 1), 1)
        elif token["plus"]:
            # One and any number more of them.
            last *= 2
        else:
            last = 1
        inside[-1] = max(inside[-1], last)
    return inside[0]
