"""R: exact sums, bounds, and the water-filling that its rounding approximates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_reasoncache.budgets import robustify


@st.composite
def problems(draw, max_size=12):
    """A solvable problem: demand, total, exponent, per-entry bounds."""
    n = draw(st.integers(1, max_size))
    demand = draw(
        st.lists(
            st.one_of(st.just(0.0), st.integers(0, 5).map(float), st.floats(0, 1e6)),
            min_size=n,
            max_size=n,
        )
    )
    low = draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))
    high = [bound + draw(st.integers(0, 60)) for bound in low]
    total = draw(st.integers(sum(low), sum(high)))
    exponent = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    return demand, total, exponent, torch.tensor(low), torch.tensor(high)


def water_level(demand, total, exponent, low, high):
    """The real-valued solution by bisection on the level, in float64."""
    largest = max(demand) or 1.0
    share = [max((d / largest if max(demand) else 1.0) ** exponent, 1e-12) for d in demand]

    def fill(level):
        return [min(max(level * s, lo), hi) for s, lo, hi in zip(share, low, high, strict=True)]

    left, right = 0.0, max(high) / min(share) + 1.0
    for _ in range(300):
        middle = (left + right) / 2
        left, right = (middle, right) if sum(fill(middle)) < total else (left, middle)
    return fill(right)


@given(problems())
def test_the_sum_is_exact_and_the_bounds_hold(problem):
    demand, total, exponent, low, high = problem
    budgets = robustify(demand, total, exponent=exponent, low=low, high=high)
    assert sum(budgets) == total
    assert all(
        lo <= b <= hi for lo, b, hi in zip(low.tolist(), budgets, high.tolist(), strict=True)
    )


@given(problems())
def test_it_rounds_the_water_level(problem):
    demand, total, exponent, low, high = problem
    budgets = robustify(demand, total, exponent=exponent, low=low, high=high)
    exact = water_level(demand, total, exponent, low.tolist(), high.tolist())
    for budget, real in zip(budgets, exact, strict=True):
        assert abs(budget - real) < 1 + 1e-6


@given(st.lists(problems(max_size=6), min_size=1, max_size=5))
def test_many_rows_are_solved_as_one_by_one(rows):
    width = min(len(demand) for demand, *_ in rows)
    demand = torch.tensor([d[:width] for d, *_ in rows], dtype=torch.float64)
    low = torch.stack([lo[:width] for *_, lo, _ in rows])
    high = torch.stack([hi[:width] for *_, hi in rows])
    total = (low.sum(-1) + high.sum(-1)) // 2
    together = robustify(demand, total, exponent=0.5, low=low, high=high)
    assert together.dtype == torch.long
    for row in range(len(rows)):
        alone = robustify(
            demand[row].tolist(), int(total[row]), exponent=0.5, low=low[row], high=high[row]
        )
        assert together[row].tolist() == alone


@given(seed=st.integers(0, 9999), n=st.integers(2, 40))
def test_it_commutes_with_permutations_and_ignores_the_scale(seed, n):
    generator = torch.Generator().manual_seed(seed)
    demand = torch.rand(n, generator=generator, dtype=torch.float64)
    settings = {"exponent": 0.5, "low": 3, "high": 19}
    budgets = robustify(demand, 10 * n, **settings)
    order = torch.randperm(n, generator=generator)
    assert torch.equal(robustify(demand[order], 10 * n, **settings), budgets[order])
    assert torch.equal(robustify(demand * 2.0**30, 10 * n, **settings), budgets)
    # More demand, at least as much budget.
    assert (budgets[demand.argsort()].diff() >= 0).all()


@pytest.mark.parametrize(
    ("demand", "total", "exponent", "low", "high", "expected"),
    [
        ([1, 4, 9, 0], 100, 0.5, 0, 60, [17, 33, 50, 0]),
        # The giant is clipped, the others share what it leaves.
        ([1e9, 1, 1], 100, 1.0, 0, 60, [60, 20, 20]),
        # Zero demand takes what does not fit elsewhere.
        ([5, 0, 0], 100, 1.0, 0, 60, [60, 20, 20]),
        # Clipping at both ends at once.
        ([100, 10, 1], 30, 1.0, 5, 16, [16, 9, 5]),
        # Ties in the remainder go to the lower index, whatever the demand's scale.
        ([0, 0, 0], 11, 0.5, 0, 9, [4, 4, 3]),
        ([7, 7, 7], 11, 0.0, 0, 9, [4, 4, 3]),
        # Bounds are cut to integers inwards; 0.07 * 100 is 7.000000000000001.
        ([1, 1], 6, 1.0, 2.3, 3.7, [3, 3]),
        ([0, 1], 20, 1.0, 0.07 * 100, 19.0, [7, 13]),
        ([1, 0], 30, 1.0, 0, 0.29 * 100, [29, 1]),
        ([3], 8, 0.5, 0, 9, [8]),
        ([1, 2], 0, 0.5, 0, 9, [0, 0]),
    ],
)
def test_examples(demand, total, exponent, low, high, expected):
    assert robustify(demand, total, exponent=exponent, low=low, high=high) == expected


def test_leading_dimensions_and_one_total_for_all():
    demand = torch.rand(2, 3, 5)
    budgets = robustify(demand, 50, exponent=0.5, low=2, high=30)
    assert budgets.shape == (2, 3, 5)
    assert (budgets.sum(-1) == 50).all()


@pytest.mark.parametrize(
    ("demand", "total", "exponent", "low", "high", "words"),
    [
        ([], 1, 0.5, 0, 1, "at least one demand"),
        ([1.0, -1.0], 2, 0.5, 0, 2, r"demand >= 0, got \[1.0, -1.0\]"),
        ([1.0, math.nan], 2, 0.5, 0, 2, "finite demand"),
        ([1.0, math.inf], 2, 0.5, 0, 2, "finite demand"),
        ([1.0, 1.0], 2, -0.5, 0, 2, "exponent >= 0, got -0.5"),
        ([1.0, 1.0], 2, math.nan, 0, 2, "exponent"),
        ([1.0, 1.0], 9, 0.5, 0, 4, "B = 9, count = 2, lo = 0, hi = 4"),
        ([1.0, 1.0], 3, 0.5, 2, 4, "B = 3, count = 2, lo = 2, hi = 4"),
        ([1.0, 1.0], 4, 0.5, torch.tensor([3, 0]), 2, r"lo = \[3.0, 0.0\], hi = 2"),
        ([1.0, 1.0], 1, 0.5, -1, 2, "lo = -1"),
        ([1.0, 1.0], 4, 0.5, 0, torch.tensor([4, 4, 4]), "for demand"),
        (torch.ones(3, 2), torch.tensor([2, 2]), 0.5, 0, 2, "for demand"),
        (torch.ones(2, 2), torch.tensor([2, 7]), 0.5, 0, 3, "B = 7, count = 2, lo = 0, hi = 3"),
        (torch.ones(2), torch.tensor(2.5), 0.5, 0, 3, "B = 2.5"),
    ],
)
def test_faults_are_named(demand, total, exponent, low, high, words):
    with pytest.raises(ValueError, match=words):
        robustify(demand, total, exponent=exponent, low=low, high=high)
