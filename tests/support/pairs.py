"""Fewer cases than a product has, where axes do not depend on each other."""

from collections.abc import Sequence
from typing import TypeVar

A, B, C = TypeVar("A"), TypeVar("B"), TypeVar("C")


def in_turn(first: Sequence[A], second: Sequence[B], last: Sequence[C]) -> list[tuple[A, B, C]]:
    """Every pair of the first two, each with the next of `last`.

    Where neither of the first two is shorter than `last`, all pairs of any two axes are among them.
    """
    return [
        (one, other, last[(i + j) % len(last)])
        for i, one in enumerate(first)
        for j, other in enumerate(second)
    ]
