"""Checks shared by the constructors of the scorers."""

from __future__ import annotations

import math


def at_least(owner: object, name: str, value: int, least: int, remedy: str) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(
            f"{type(owner).__name__} expects an integer {name} >= {least}, got {value!r}; {remedy}."
        )


def odd(owner: object, name: str, value: int) -> None:
    """Raise ValueError unless `value` is an odd positive integer."""
    if not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise ValueError(
            f"{type(owner).__name__} expects an odd {name} >= 1, got {value!r}; "
            "an even one has no centre, and 1 switches pooling off."
        )


def share(owner: object, name: str, value: float, remedy: str) -> None:
    """Raise ValueError unless `value` lies in [0, 1]."""
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise ValueError(
            f"{type(owner).__name__} expects {name} in [0, 1], got {value!r}; {remedy}."
        )
