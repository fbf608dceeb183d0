"""A rule is the three constants of `layer_budgets`, checked when it is made."""

from __future__ import annotations

import inspect
import math

import pytest

from hf_reasoncache.budgets import BudgetRule, layer_budgets


def test_the_defaults_are_those_of_the_operator() -> None:
    parameters = inspect.signature(layer_budgets).parameters
    assert vars(BudgetRule()) == {
        name: parameters[name].default for name in ("exponent", "low", "high")
    }


def test_its_budgets() -> None:
    rule = BudgetRule(exponent=1, low=0, high=3)
    assert rule.layer_budgets([1, 2, 3], 60) == [30, 60, 90]
    assert rule.layer_budgets([0, 0, 3], 60, floor=10) == layer_budgets(
        [0, 0, 3], 60, exponent=1, low=0, high=3, floor=10
    )


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1e308])
@pytest.mark.parametrize("high", [3.0, 1e9, 1.7e308])
@pytest.mark.parametrize("demand", [[1, 2, 3], [1e-300, 1e300, 5], [0, 0, 1]])
def test_extreme_constants(exponent: float, high: float, demand: list[float]) -> None:
    budgets = BudgetRule(exponent, 0.0, high).layer_budgets(demand, 64)
    assert sum(budgets) == 192 and min(budgets) >= 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"exponent": -0.1},
        {"exponent": math.nan},
        {"exponent": math.inf},
        {"exponent": "0.5"},
        {"exponent": True},
        {"low": -0.1},
        {"low": 1.1},
        {"low": None},
        {"high": 0.9},
        {"high": math.inf},
        {"high": math.nan},
        {"high": 10**400},
    ],
)
def test_wrong_constants(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expect"):
        BudgetRule(**wrong)
