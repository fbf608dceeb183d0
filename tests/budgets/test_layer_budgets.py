"""Layer budgets: demands, bounds in multiples of the mean, and the floor."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_reasoncache.budgets import layer_budgets, pyramid, uniform


@given(
    demand=st.lists(st.floats(0, 1e4), min_size=1, max_size=40),
    mean=st.integers(1, 2000),
    floor_share=st.floats(0, 1),
)
def test_the_model_spends_its_budget_within_the_bounds(demand, mean, floor_share):
    floor = int(floor_share * mean)
    budgets = layer_budgets(demand, mean, floor=floor)
    assert sum(budgets) == mean * len(demand)
    assert min(budgets) >= max(0.25 * mean, floor)
    assert max(budgets) <= 2 * mean


def test_uniform_demand_gives_every_layer_the_mean():
    assert layer_budgets(uniform(7), 100) == [100] * 7


def test_the_floor_overrides_the_lower_bound():
    assert layer_budgets([9, 0, 0], 10, high=2.0, floor=8) == [14, 8, 8]
    assert layer_budgets([9, 0, 0], 10, high=1.0, floor=10) == [10, 10, 10]


def test_a_peak_is_capped_and_a_valley_filled():
    assert layer_budgets([1e6, 1, 1, 1], 100) == [200, 67, 67, 66]
    assert layer_budgets([1, 1e6, 1e6, 1e6], 100) == [25, 125, 125, 125]


def test_pyramid_is_a_falling_line_of_mean_one():
    demand = pyramid(5, beta=20)
    steps = [left - right for left, right in itertools.pairwise(demand)]
    assert demand[0] == pytest.approx(1.95)
    assert demand[-1] == pytest.approx(0.05)
    assert sum(demand) == pytest.approx(5)
    assert steps == pytest.approx([steps[0]] * 4)
    assert pyramid(3, beta=1) == uniform(3)
    assert pyramid(1) == [1.0]


def test_the_papers_pyramid_is_spent_as_drawn():
    budgets = layer_budgets(pyramid(5), 100, exponent=1, low=0, high=2)
    assert budgets == [195, 148, 100, 52, 5] or budgets == [195, 147, 100, 53, 5]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: uniform(0), "at least 1 layer, got 0"),
        (lambda: pyramid(-1), "at least 1 layer, got -1"),
        (lambda: pyramid(4, beta=0.5), "beta >= 1, got 0.5"),
        (lambda: pyramid(4, beta=float("inf")), "finite beta"),
        (lambda: layer_budgets([1, 2], 64, floor=65), "floor = 65 and mean_budget = 64"),
        (lambda: layer_budgets([1, 2], 64, floor=-1), "floor = -1"),
        (lambda: layer_budgets([1, 2], 0), "mean_budget = 0"),
        (lambda: layer_budgets([1, 2], 64, low=1.2), "low = 1.2"),
        (lambda: layer_budgets([1, 2], 64, high=0.9), "high = 0.9"),
        (lambda: layer_budgets([1, 2], 64, low=-0.1), "low = -0.1"),
        (lambda: layer_budgets([1, float("nan")], 64), "finite demand"),
        (lambda: layer_budgets([], 64), "at least one demand"),
    ],
)
def test_faults_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
