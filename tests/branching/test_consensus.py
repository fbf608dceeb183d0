"""Consensus against enumeration, and the exact bound against scipy."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, betabinom

from hf_reasoncache.branching.binomial import upper_bound
from hf_reasoncache.branching.consensus import probability_kept

ANSWERS = st.lists(st.sampled_from(["1", "2", "3", None]), max_size=7)


def survives_everything(answers: list[str | None], remaining: int) -> bool:
    """Brute force: is one answer the sole majority, whatever the rest says?"""
    winners = set()
    for rest in itertools.product(["1", "2", "3", "new", None], repeat=remaining):
        counts = {a: [*answers, *rest].count(a) for a in {*answers, *rest} - {None}}
        best = [a for a, n in counts.items() if n == max(counts.values())]
        winners.add(best[0] if len(best) == 1 else None)
    return len(winners) == 1 and None not in winners


@given(ANSWERS, st.integers(0, 4))
def test_certainty_is_what_no_vote_can_overturn(answers, remaining):
    certain = probability_kept(answers, remaining) == 1.0
    assert certain == survives_everything(answers, remaining)


@given(ANSWERS, st.integers(0, 40))
def test_the_probability_is_a_tail_of_scipys_beta_binomial(answers, remaining):
    counts = sorted((answers.count(a) for a in ("1", "2", "3")), reverse=True)
    if counts[0] == 0:
        expected = 0.0
    else:
        tail = betabinom(remaining, 1 + counts[0], 1 + len(answers) - counts[0])
        expected = sum(
            tail.pmf(x) for x in range(remaining + 1) if counts[0] + x > counts[1] + remaining - x
        )
    assert probability_kept(answers, remaining) == pytest.approx(expected, abs=1e-9)


def test_the_probability_bounds_simulated_votes_from_below():
    """Draw the leader's share from its posterior and the rest of the votes from any split."""
    answers, remaining = ["1", "1", "1", "2", "3"], 11
    share = torch.distributions.Beta(4.0, 3.0).sample((200_000,))
    supporters = torch.distributions.Binomial(remaining, share).sample()
    rest = remaining - supporters
    to_second = torch.distributions.Binomial(rest, torch.tensor(0.5)).sample()
    kept = (3 + supporters > 1 + to_second) & (3 + supporters > 1 + rest - to_second)
    assert float(kept.float().mean()) > probability_kept(answers, remaining)


@given(st.integers(0, 30), st.integers(0, 300), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_bound_is_clopper_and_pearsons(errors, more, confidence):
    trials = errors + more
    expected = 1.0 if more == 0 else beta.ppf(confidence, errors + 1, trials - errors)
    assert upper_bound(errors, trials, confidence) == pytest.approx(expected, abs=1e-9)


def test_the_numbers_of_problems_in_the_docs():
    assert upper_bound(0, 59, 0.95) <= 0.05 < upper_bound(0, 58, 0.95)
    assert upper_bound(0, 299, 0.95) <= 0.01 < upper_bound(0, 298, 0.95)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 2, 0.95), "errors: expected 0 to 2"), ((0, 2, 1.0), "confidence: expected")],
)
def test_impossible_counts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        upper_bound(*arguments)
