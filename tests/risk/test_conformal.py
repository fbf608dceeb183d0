"""Conformal bounds: the arithmetic on small cases, and coverage over many drawn texts."""

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reasoncache.risk import conformal_bound, coverage


def test_one_probe_per_text_is_split_conformal():
    values = [float(v) for v in range(1, 20)]
    # The ceil(0.9 * 20) = 18th smallest of 19.
    assert conformal_bound([[v] for v in values], 0.1) == 18.0
    assert conformal_bound([[v] for v in values], 0.05) == 19.0
    assert conformal_bound([[v] for v in values], 0.04) == math.inf


def test_every_text_weighs_the_same():
    # Nine texts with one probe each, and one with ninety: not ninety texts.
    groups = [[1.0]] * 9 + [[5.0] * 90]
    assert conformal_bound(groups, 0.2) == 1.0
    assert conformal_bound(groups, 0.1) == 5.0
    assert conformal_bound([*groups, []], 0.1) == 5.0, "a text without probes says nothing"


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1, max_size=12),
    st.floats(0.02, 0.98),
)
def test_a_bound_covers_its_own_texts_and_falls_with_alpha(groups, alpha):
    bound = conformal_bound(groups, alpha)
    needed = (1 - alpha) * (len(groups) + 1) / len(groups)
    assert bound == math.inf or statistics.mean(coverage(groups, bound)) >= needed - 1e-6
    assert conformal_bound(groups, alpha / 2) >= bound


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_coverage_of_a_later_text_is_at_least_nominal(alpha):
    """Texts differ in scale and in their number of probes, which depends on the scale."""
    draw = random.Random(0)

    def text():
        scale = draw.expovariate(1.0)
        return [scale * draw.random() for _ in range(1 + int(10 * scale))]

    covered = []
    for _ in range(600):
        bound = conformal_bound([text() for _ in range(25)], alpha)
        covered += coverage([text()], bound)
    mean, error = statistics.mean(covered), statistics.stdev(covered) / len(covered) ** 0.5
    assert mean >= 1 - alpha - 2.5 * error
    assert mean <= 1 - alpha + 1 / 26 + 2.5 * error, "and not wasteful"


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1, math.nan])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match=r"expected alpha in \(0, 1\)"):
        conformal_bound([[1.0]], alpha)


@pytest.mark.parametrize("groups", [[], [[]], [[1.0, math.nan]]], ids=repr)
def test_nothing_to_bound_with(groups):
    with pytest.raises(ValueError, match="expected errors, numbers, of at least one text"):
        conformal_bound(groups, 0.1)
