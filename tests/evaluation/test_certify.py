"""Certified budgets: the arithmetic on small cases, and the promise over many drawn questions."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reasoncache.evaluation import certificates, certify
from tests.support.records import record

BUDGETS = (64, 128, 256)


def test_the_smallest_budget_whose_bound_is_small_enough() -> None:
    losses = {256: [0.0] * 19, 64: [1.0] * 5 + [0.0] * 14, 128: [1.0] + [0.0] * 18}
    found = certify(losses, 0.1)
    assert (found.budget, found.questions, found.refusal) == (128, 19, None)
    assert found.bounds == {64: 6 / 20, 128: 2 / 20, 256: 1 / 20}
    assert (found.bound, found.mean_loss) == (2 / 20, 1 / 19)
    assert certify(losses, 0.3).budget == 64
    assert certify(losses, 0.05).budget == 256


def test_a_question_counts_with_its_largest_loss_at_any_larger_budget() -> None:
    losses = {64: [1.0, 0.0] + [0.0] * 18, 128: [0.0, 1.0] + [0.0] * 18}
    found = certify(losses, 0.12)
    assert found.bounds == {64: 3 / 21, 128: 2 / 21}
    assert found.budget == 128


def test_too_few_questions_certify_nothing() -> None:
    assert certify({64: [0.0] * 19}, 0.05).budget == 64
    found = certify({64: [0.0] * 18}, 0.05)
    assert found.budget is None
    assert found.refusal == "18 questions; 0.05 needs 19 or more"


def test_no_budget_is_good_enough() -> None:
    found = certify({64: [1.0] * 40, 128: [1.0] * 20 + [0.0] * 20}, 0.2)
    assert found.budget is None and found.refusal == "no budget has a bound of 0.2 or less"
    assert (found.bound, found.mean_loss) == (21 / 41, 0.5)


def test_a_loss_that_rises_with_the_budget_is_refused() -> None:
    """Seven questions of 60 that only the larger budget loses: p = 2 / 2**7."""
    losses = {64: [0.0] * 60, 128: [1.0] * 7 + [0.0] * 53}
    found = certify(losses, 0.5)
    assert found.budget is None and found.refusal == "loss rises from 64 to 128 (p = 0.016)"
    assert certify({64: [0.0] * 60, 128: [1.0] * 5 + [0.0] * 55}, 0.5).budget == 64, "chance"


@settings(max_examples=80)
@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=30), st.floats(0.02, 0.9))
def test_bounds_fall_with_the_budget_and_lie_above_the_loss(rows, alpha: float) -> None:
    losses = dict(zip(BUDGETS, zip(*rows, strict=True), strict=True))
    found = certify(losses, alpha)
    assert list(found.bounds.values()) == sorted(found.bounds.values(), reverse=True)
    assert all(found.bounds[each] >= statistics.mean(losses[each]) - 1e-12 for each in BUDGETS)
    assert found.budget is None or found.bounds[found.budget] <= alpha
    assert (found.budget is None) == (found.refusal is not None)


@pytest.mark.parametrize(("alpha", "count"), [(0.1, 30), (0.3, 12)])
def test_the_loss_of_a_later_question_is_at_most_alpha(alpha: float, count: int) -> None:
    """Questions need a number of tokens each; answers at larger budgets sometimes fail by chance.

    Without a certificate the full cache answers, which loses nothing.
    """
    draw = random.Random(0)

    def question() -> dict[int, float]:
        needed = draw.expovariate(1 / 80)
        return {b: float(needed > b or draw.random() < 0.02) for b in (16, 32, *BUDGETS, 512)}

    lost = []
    for _ in range(3000):
        seen = [question() for _ in range(count)]
        found = certify({budget: [each[budget] for each in seen] for budget in seen[0]}, alpha)
        lost.append(0.0 if found.budget is None else question()[found.budget])
    mean, error = statistics.mean(lost), statistics.stdev(lost) / len(lost) ** 0.5
    assert mean <= alpha + 2 * error
    assert mean >= alpha / 4, "and not wasteful"


def test_certificates_are_of_tasks_caches_and_kinds_of_budgets() -> None:
    answers = []
    for name in map(str, range(9)):
        answers.append(record(question=name, digest=f"q{name}", correct=name != "1"))
        for budget in (64, 128, 0.5):
            right = budget != 64 or name not in "12"
            answers.append(
                record(question=name, digest="x", cache="rkv", budget=budget, correct=right)
            )
    answers.append(record(task="essay", correct=None))
    found = certificates(answers, 0.1)
    assert list(found) == [("sums", "rkv")]
    tokens, ratios = found["sums", "rkv"]
    # Of the two wrong answers one is to a question that the full cache does not answer either.
    assert tokens.bounds == {64: 2 / 10, 128: 1 / 10} and tokens.budget == 128
    assert ratios.bounds == {0.5: 1 / 10}


def test_seeds_of_the_same_question_are_one_question() -> None:
    answers = [record(seed=seed, question="a") for seed in range(2)]
    answers += [
        record(seed=seed, cache="rkv", budget=64, digest="x", correct=bool(seed))
        for seed in range(2)
    ]
    (found,) = certificates(answers, 0.5)["sums", "rkv"]
    assert (found.questions, found.mean_loss) == (1, 0.5)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1, math.nan])
def test_bad_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"expected alpha in \(0, 1\)"):
        certify({64: [0.0]}, alpha)


@pytest.mark.parametrize("losses", [{}, {64: []}, {64: [0.0], 128: [0.0, 1.0]}], ids=repr)
def test_losses_are_of_the_same_questions(losses) -> None:
    with pytest.raises(ValueError, match="losses of the same questions, at least one"):
        certify(losses, 0.1)


def test_losses_are_shares() -> None:
    with pytest.raises(ValueError, match="loss at 64: expected a number from 0 to 1, got 2"):
        certify({64: [2.0]}, 0.1)


def test_answers_without_the_full_cache() -> None:
    with pytest.raises(ValueError, match="an answer of the full cache to 'a', got none"):
        certificates([record(cache="rkv", budget=64)], 0.1)
