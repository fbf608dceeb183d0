"""Head budgets: the pooled count, the bounds, the lattice, row by row."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_reasoncache.budgets import head_budgets, robustify


def example(seed, rows, heads, held):
    """Scores whose scale differs by head, ragged, with some protected tokens."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, held + 1, (rows, heads, 1), generator=generator)
    scores = torch.rand(rows, heads, held, generator=generator)
    scores = scores * 4 ** torch.randn(rows, heads, 1, generator=generator)
    scores[..., :2] = torch.inf
    valid = torch.arange(held) < counts
    return scores.masked_fill(~valid, 1e9), valid


def reaching(scores, valid, total, comparable):
    """Each head's tokens among the best of the row, by sorting the pool."""
    heads = [
        [
            s * (sum(v) if comparable == "length" else 1)
            for s, keep in zip(h, v, strict=True)
            if keep
        ]
        for h, v in zip(scores.tolist(), valid.tolist(), strict=True)
    ]
    pool = sorted((s for head in heads for s in head), reverse=True)
    bar = pool[min(total, len(pool)) - 1]
    return [sum(s >= bar for s in head) for head in heads]


PROBLEMS = {
    "seed": st.integers(0, 9999),
    "rows": st.integers(1, 4),
    "heads": st.integers(1, 9),
    "mean": st.integers(4, 200),
    "odd": st.integers(0, 8),
    "floor_share": st.floats(0, 1),
}


@given(**PROBLEMS)
def test_rows_spend_their_total_within_the_bounds(seed, rows, heads, mean, odd, floor_share):
    scores, valid = example(seed, rows, heads, 50)
    total = mean * heads + torch.arange(rows) * odd
    floor = (total // heads * floor_share).long()
    budgets = head_budgets(scores, valid, total, floor=floor)
    assert budgets.dtype == torch.long
    assert torch.equal(budgets.sum(-1), total)
    assert (budgets >= floor[:, None]).all()
    assert (budgets >= 0.25 * total[:, None] / heads).all()
    assert (budgets <= torch.maximum(2 * total / heads, floor)[:, None]).all()


@given(**PROBLEMS)
def test_budgets_lie_on_a_lattice_but_for_one_head(seed, rows, heads, mean, odd, floor_share):
    scores, valid = example(seed, rows, heads, 50)
    total = mean * heads + odd
    floor = int(total // heads * floor_share)
    budgets = head_budgets(scores, valid, total, floor=floor)
    lowest = max(math.ceil(0.25 * total / heads - 1e-9), floor)
    unit = max(1, (total // heads - lowest) // 2)
    for row in budgets - lowest:
        off = (row % unit != 0).sum()
        assert off <= 1 or unit == 1
        assert len(row.unique()) <= 7


@pytest.mark.parametrize("comparable", ["length", "raw"])
@given(seed=st.integers(0, 9999))
def test_without_a_lattice_it_is_r_of_the_pooled_counts(comparable, seed):
    scores, valid = example(seed, 3, 5, 40)
    total = torch.tensor([15, 20, 25])  # means below 6: the unit is 1
    budgets = head_budgets(scores, valid, total, comparable=comparable)
    for row in range(3):
        mean = int(total[row]) / 5
        demand = reaching(scores[row], valid[row], int(total[row]), comparable)
        expected = robustify(demand, int(total[row]), exponent=0.5, low=0.25 * mean, high=2 * mean)
        assert budgets[row].tolist() == expected


@pytest.mark.parametrize("comparable", ["length", "raw"])
@given(seed=st.integers(0, 9999))
def test_lattice_off_is_r_of_the_pooled_counts_for_any_mean(comparable, seed):
    scores, valid = example(seed, 2, 5, 400)
    total = torch.tensor([643, 500])
    budgets = head_budgets(scores, valid, total, comparable=comparable, lattice=False)
    for row in range(2):
        mean = int(total[row]) / 5
        demand = reaching(scores[row], valid[row], int(total[row]), comparable)
        expected = robustify(demand, int(total[row]), exponent=0.5, low=0.25 * mean, high=2 * mean)
        assert budgets[row].tolist() == expected


@given(seed=st.integers(0, 9999))
# Three heads at R's upper bound, which the lattice does not reach: others get what they lose.
@hypothesis.example(seed=6322)
@hypothesis.example(seed=913)
def test_the_lattice_stays_near_r(seed):
    scores, valid = example(seed, 1, 8, 400)
    budgets = head_budgets(scores, valid, 8 * 128, comparable="raw")
    demand = reaching(scores[0], valid[0], 8 * 128, "raw")
    unit = (128 - 32) // 2
    highest = 32 + (256 - 32) // unit * unit
    exact = robustify(torch.tensor([demand]), 8 * 128, exponent=0.5, low=32, high=highest)
    assert (budgets - exact).abs().max() < 2 * (128 - 32) // 2


@given(**PROBLEMS)
def test_rows_do_not_influence_each_other(seed, rows, heads, mean, odd, floor_share):
    scores, valid = example(seed, rows, heads, 50)
    total = mean * heads + torch.arange(rows) * odd
    floor = (total // heads * floor_share).long()
    together = head_budgets(scores, valid, total, floor=floor)
    for row in range(rows):
        one = slice(row, row + 1)
        width = int(valid[row].sum(-1).max())
        alone = head_budgets(
            scores[one, :, :width], valid[one, :, :width], int(total[row]), floor=int(floor[row])
        )
        assert torch.equal(together[one], alone)


def test_the_head_with_the_best_tokens_gets_most():
    scores = torch.rand(1, 4, 100)
    scores[0, 2] += 1.0
    valid = torch.ones_like(scores, dtype=torch.bool)
    # The counts are about 100 for head 2 and 20 for each of the others.
    budgets = head_budgets(scores, valid, 4 * 40, exponent=1.0, high=3.0)
    assert budgets[0, 2] > 2 * budgets[0, [0, 1, 3]].max()


def test_the_length_undoes_a_normalisation_over_the_heads_own_tokens():
    utility = torch.rand(1, 1, 64).expand(1, 2, 64)
    valid = torch.arange(64) < torch.tensor([[[64], [16]]])
    normalised = utility / valid.sum(-1, keepdim=True)
    as_length = head_budgets(normalised, valid, 20, exponent=1.0, high=4.0)
    as_raw = head_budgets(normalised, valid, 20, exponent=1.0, high=4.0, comparable="raw")
    # Head 0 has four times as many tokens as good as those of head 1.
    assert as_length[0, 0] > as_length[0, 1]
    assert as_raw[0, 0] < as_raw[0, 1]


def test_protected_tokens_count_whatever_they_score():
    scores = torch.rand(1, 2, 30)
    scores[0, 0, :12] = torch.inf
    valid = torch.ones_like(scores, dtype=torch.bool)
    # Negative scores times a length are still below; head 1 gets its lower bound, 12 / 2 / 4.
    budgets = head_budgets(scores - 5.0, valid, 12, exponent=1.0)
    assert budgets[0].tolist() == [10, 2]


def test_equal_heads_get_equal_budgets_and_one_takes_the_odd_remainder():
    scores = torch.rand(1, 1, 100).expand(1, 4, 100)
    valid = torch.ones_like(scores, dtype=torch.bool)
    assert head_budgets(scores, valid, 4 * 50)[0].unique().numel() <= 3
    assert head_budgets(scores, valid, 4 * 64, floor=24)[0].tolist() == [64] * 4


def test_a_row_that_holds_less_than_its_total_is_counted_whole():
    scores = torch.rand(1, 2, 8)
    valid = torch.arange(8) < torch.tensor([[[8], [2]]])
    assert head_budgets(scores, valid, 40, exponent=1.0)[0].tolist() == [
        33,
        7,
    ]  # 32 and 8 on a lattice of 5 + 7 k


@given(
    low=st.sampled_from([0.0, 0.25, 0.9, 1.0]), high=st.sampled_from([1.0, 1.03, 1.2]), **PROBLEMS
)
def test_bounds_too_narrow_for_the_lattice_are_kept(
    seed, rows, heads, mean, odd, floor_share, low, high
):
    scores, valid = example(seed, rows, heads, 50)
    total = mean * heads + odd
    floor = int(total // heads * floor_share)
    budgets = head_budgets(scores, valid, total, floor=floor, low=low, high=high)
    assert (budgets.sum(-1) == total).all()
    assert budgets.min() >= max(floor, min(math.ceil(low * total / heads), total // heads))
    assert budgets.max() <= max(high * total / heads, math.ceil(total / heads))


def best_tokens(counts, held):
    """One row whose heads hold `counts` tokens of score 1 among many of score 0."""
    scores = (torch.arange(held) < torch.tensor(counts)[:, None]).float()[None]
    return scores, torch.ones_like(scores, dtype=torch.bool)


@pytest.mark.parametrize(
    ("counts", "low", "high", "expected"),
    [
        # Unit 6, two steps of it end 1 short of the bound 13: the remainder of 2 fits nowhere.
        ([13, 13], 0.0, 1.0, [13, 13]),
        # Unit 15: both heads lack 1, the first is served first but has no room for 2.
        ([46, 16], 0.0, 1.5, [45, 17]),
        # The lower bound is 7, though 0.07 * 100 is 7.000000000000001.
        ([200, 0], 0.07, 2.0, [193, 7]),
    ],
)
def test_remainders_and_bounds_by_hand(counts, low, high, expected):
    scores, valid = best_tokens(counts, max(counts))
    budgets = head_budgets(
        scores, valid, sum(counts), exponent=1.0, low=low, high=high, comparable="raw"
    )
    assert budgets[0].tolist() == expected


def test_a_row_that_holds_nothing_is_split_evenly():
    scores = torch.rand(2, 4, 6)
    valid = torch.tensor([True, False])[:, None, None].expand(2, 4, 6)
    assert head_budgets(scores, valid, 16)[1].tolist() == [4] * 4


def good():
    return {"scores": torch.rand(2, 3, 5), "valid": torch.ones(2, 3, 5, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": torch.rand(3, 5)}, r"\[R, H, N\]"),
        ({"valid": torch.ones(2, 3, 4, dtype=torch.bool)}, r"\[2, 3, 4\]"),
        ({"comparable": "sqrt"}, "'sqrt'"),
        ({"low": 1.5}, "low = 1.5"),
        ({"high": 0.5}, "high = 0.5"),
        ({"floor": 5}, r"floor = \[5, 5\], heads = 3 and total = \[12, 12\]"),
        ({"floor": torch.tensor([1, -1])}, "floor"),
        ({"total": torch.tensor([12, 12, 12])}, "total"),
        ({"floor": torch.zeros(2, 3)}, "floor"),
    ],
)
def test_faults_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        head_budgets(**{**good(), "total": 12, **change})
