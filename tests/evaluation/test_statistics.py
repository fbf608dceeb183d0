"""Intervals, tests, ROUGE-L: against textbook figures and brute force."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar

from hf_reasoncache.evaluation import Paired, Share, rouge_l_recall
from hf_reasoncache.evaluation.statistics import rank_correlation

WORDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=6)


def test_share_has_wilson_bounds() -> None:
    low, high = Share.of([True] * 190 + [False] * 10).interval
    assert low == pytest.approx(0.9104, abs=1e-4)
    assert high == pytest.approx(0.9726, abs=1e-4)
    assert math.isnan(Share.of([]).value)
    assert Share.of([]).percent == "-"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_paired_test_is_mcnemars(pairs: list[tuple[bool, bool]]) -> None:
    first, second = zip(*pairs, strict=True)
    table = [
        [sum((a, b) == (x, y) for a, b in pairs) for y in (True, False)] for x in (True, False)
    ]
    paired = Paired.of(first, second)
    assert paired.p_value == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert paired.difference == pytest.approx((sum(second) - sum(first)) / len(pairs))


def test_pairs_are_of_the_same_questions() -> None:
    with pytest.raises(ValueError, match="same questions, got 1 and 2"):
        Paired.of([True], [True, False])


def test_rank_correlation_is_undefined_rather_than_zero() -> None:
    assert rank_correlation([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(rank_correlation([1, 2], [1, 2]))


@given(WORDS, WORDS)
def test_rouge_l_is_the_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    def subsequences(words: list[str], length: int) -> set[tuple[str, ...]]:
        return set(combinations(words, length))

    longest = max(
        length
        for length in range(len(first) + 1)
        if length == 0 or subsequences(first, length) & subsequences(second, length)
    )
    assert rouge_l_recall(" ".join(first), " ".join(second)) == longest / len(first)


def test_rouge_l_ignores_case_and_punctuation() -> None:
    assert rouge_l_recall("Never say the code.", 'He did say: "THE code"!') == 0.75
    with pytest.raises(ValueError, match="reference with words"):
        rouge_l_recall(" . ", "x")
