"""Votes and their weights."""

import math

import pytest

from hf_reasoncache.branching.verify import VerificationSkip, Verified
from hf_reasoncache.branching.vote import (
    Branch,
    Reason,
    group_confidence,
    majority,
    sqrt_confidence,
    vote,
)


def branch(answer, confidence=0.81, runner_up=0.1, group=10.0, reason=Reason.END, tokens=5):
    return Branch(answer, reason, tokens, confidence, runner_up, group)


def test_majority_counts_branches_and_the_first_of_equals_wins():
    result = vote([branch("7"), branch(None), branch("3"), branch("3"), branch("7")])
    assert (result.answer, result.weights) == ("7", {"7": 2.0, "3": 2.0})
    assert vote([branch("7"), branch("3"), branch("3")]).answer == "3"
    assert vote([branch(None)]).answer is None


def test_weights_may_overrule_the_majority():
    branches = [branch("7", 0.04, group=1.0), branch("7", 0.09, group=1.0), branch("3", group=9.0)]
    assert vote(branches, majority).answer == "7"
    result = vote(branches, sqrt_confidence)
    assert result.answer == "3"
    assert result.weights == pytest.approx({"3": 0.9, "7": 0.5})
    assert vote(branches, group_confidence).weights == {"3": 9.0, "7": 2.0}


def test_only_branches_that_are_not_sure_are_verified():
    skip = VerificationSkip()
    assert skip(branch("1", 0.70, 0.64)) and not skip(branch("1", 0.70, 0.65))
    assert skip(branch("1", 0.63, 0.57)) and not skip(branch("1", 0.63, 0.59))
    assert not skip(branch("1", 0.62, 0.0))
    seen = []
    weight = Verified(lambda each: seen.append(each) or 0.5)
    unsure = branch("3", 0.36, 0.3)
    result = vote([branch("7"), unsure, branch(None, 0.1)], weight)
    assert seen == [unsure] and (weight.verified, weight.skipped) == (1, 1)
    assert result.weights == pytest.approx({"7": 0.9, "3": 0.5 * math.sqrt(0.36)})
    everybody = Verified(lambda each: 1.0, skip=None)
    vote([branch("7"), unsure], everybody)
    assert (everybody.verified, everybody.skipped) == (2, 0)


def test_the_summary_says_who_stopped_and_why():
    result = vote(
        [
            branch("7"),
            branch(None, reason=Reason.WEAK),
            branch(None, reason=Reason.CONSENSUS, tokens=2),
            branch("7", reason=Reason.CONFIDENT),
        ]
    )
    assert (result.tokens, result.stopped) == (17, 3)
    assert str(result) == "answer 7 (7: 2); 17 tokens; 1 ended, 1 confident, 1 weak, 1 consensus"
    assert "no votes" in str(vote([branch(None)]))


@pytest.mark.parametrize("weight", [sqrt_confidence, group_confidence, VerificationSkip()])
def test_weights_need_a_recording(weight):
    with pytest.raises(ValueError, match="recorder"):
        vote([Branch("7", Reason.END, 5)], weight)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_weight_is_not_negative(value):
    with pytest.raises(ValueError, match="expected a number >= 0"):
        vote([branch("7")], lambda _: value)
    with pytest.raises(ValueError, match="from 0 to 1"):
        vote([branch("7")], Verified(lambda _: value, skip=None))
    with pytest.raises(ValueError, match="gap: expected"):
        VerificationSkip(gap=value)
