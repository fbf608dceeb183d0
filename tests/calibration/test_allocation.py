"""Budgets from curves against trying every split."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_reasoncache.calibration.allocation import convex_hull, marginal_allocation

BUDGETS = (4, 6, 9, 12)
LENGTH = 16
NOISE = 2e-3


def curve(errors: list[float], floor: float, at: int) -> float:
    """The lower hull by its definition: the lowest chord over `at`."""
    values = [math.log(max(error, floor)) for error in errors]
    points = list(zip((*BUDGETS, LENGTH), (*values, math.log(floor)), strict=True))
    chords = [
        a[1] if a[0] == b[0] else a[1] + (b[1] - a[1]) * (at - a[0]) / (b[0] - a[0])
        for a, b in itertools.combinations_with_replacement(points, 2)
        if a[0] <= at <= b[0]
    ]
    return math.exp(min(chords)) if at <= LENGTH else floor


errors_of_a_layer = st.lists(st.floats(0.0, 3.0), min_size=len(BUDGETS), max_size=len(BUDGETS)).map(
    lambda values: sorted(values, reverse=True)
)


@given(
    errors=st.lists(errors_of_a_layer, min_size=1, max_size=3),
    mean=st.integers(min_value=4, max_value=18),
)
def test_no_other_split_has_less_error(errors: list[list[float]], mean: int) -> None:
    total = mean * len(errors)
    found = marginal_allocation(BUDGETS, torch.tensor(errors), LENGTH, total)
    assert sum(found) <= total
    assert min(found) >= BUDGETS[0]
    floor = max(max(map(max, errors)) * NOISE, 1e-300)

    def error(split: tuple[int, ...]) -> float:
        return sum(curve(layer, floor, at) for layer, at in zip(errors, split, strict=True))

    choices = itertools.product(range(BUDGETS[0], total + 1), repeat=len(errors))
    best = min(error(split) for split in choices if sum(split) == total)
    assert error(tuple(found)) <= best * (1 + 1e-5) + 1e-12
    if sum(found) < total:
        assert error(tuple(found)) == pytest.approx(floor * len(errors), rel=1e-5)


def test_tokens_that_help_nobody_are_not_spent() -> None:
    errors = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.0] * 4, [5e-4] * 4])
    assert marginal_allocation(BUDGETS, errors, LENGTH, 18) == [6, 4, 4]
    assert marginal_allocation(BUDGETS, torch.zeros(3, 4), LENGTH, 19) == [4, 4, 4]


def test_a_hungry_layer_is_served_first() -> None:
    errors = torch.tensor([[0.0] * 4, [2.0, 1.0, 0.5, 0.25], [0.01] * 4])
    low, high, middle = marginal_allocation(BUDGETS, errors, LENGTH, 24)
    assert (low, high) == (4, 16) and middle == 4


def test_the_hull_lies_below_all_points_and_is_convex() -> None:
    points = [(0.0, 3.0), (1.0, 2.9), (2.0, 0.5), (3.0, 0.6), (4.0, 0.0)]
    assert convex_hull(points) == [(0.0, 3.0), (2.0, 0.5), (4.0, 0.0)]
    assert convex_hull(points[:1]) == points[:1]


@pytest.mark.parametrize("length", [4, 5, 9])
def test_texts_shorter_than_a_measured_budget_end_the_curve(length: int) -> None:
    errors = torch.tensor([[1.0, 0.5, 0.2, 0.1], [0.1, 0.1, 0.1, 0.1]])
    found = marginal_allocation(BUDGETS, errors, length, 20)
    assert found == [length, length]
