"""The distance of waves, against scipy's on finely cut layers, and as a metric."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from hf_reasoncache.profiles.distance import wave_distance

DEMAND = st.just(0.0) | st.floats(1e-6, 1e6)
WAVES = st.lists(DEMAND, min_size=1, max_size=12).filter(any)


def cut(wave: list[float], parts: int) -> tuple[list[float], list[float]]:
    """Point masses: every layer cut into equal parts, each in its middle."""
    count = len(wave) * parts
    return [(i + 0.5) / count for i in range(count)], [d for d in wave for _ in range(parts)]


@given(WAVES, WAVES)
def test_agrees_with_scipy(wave: list[float], other: list[float]) -> None:
    # Both sides on the same fine grid, so that only the grid's own width, 1/n, can differ.
    n = math.lcm(len(wave), len(other)) * 4
    places, mass = cut(wave, n // len(wave))
    others, other_mass = cut(other, n // len(other))
    expected = wasserstein_distance(places, others, mass, other_mass)
    # On a common grid point masses give the trapezoid rule; it errs only where the gap crosses 0.
    assert wave_distance(wave, other) == pytest.approx(expected, abs=0.25 / n)


@given(WAVES, WAVES, WAVES)
def test_is_a_metric(a: list[float], b: list[float], c: list[float]) -> None:
    assert wave_distance(a, a) == 0
    assert wave_distance(a, b) == pytest.approx(wave_distance(b, a), abs=1e-12)
    assert wave_distance(a, c) <= wave_distance(a, b) + wave_distance(b, c) + 1e-9
    assert 0 <= wave_distance(a, b) <= 1


@given(WAVES, st.integers(1, 5), st.floats(1e-3, 1e3))
def test_resolution_and_scale_do_not_count(wave: list[float], parts: int, scale: float) -> None:
    finer = [scale * demand for demand in wave for _ in range(parts)]
    assert wave_distance(wave, finer) == pytest.approx(0, abs=1e-12)


def test_values_done_by_hand() -> None:
    # The mass of half a model moves by half of its depth.
    assert wave_distance([1, 0], [0, 1]) == pytest.approx(0.5)
    assert wave_distance([1, 1], [0, 1]) == pytest.approx(0.25)
    # F: 0.5 against 0.75 in the middle of the model, a triangle of height 0.25 over it.
    assert wave_distance([1, 1], [3, 1]) == pytest.approx(0.125)
    # The gap runs from 0 over +1/6 at 1/3 and -1/6 at 2/3 back to 0.
    assert wave_distance([1, 1, 1], [3, 0, 3]) == pytest.approx(3 * (1 / 3 * 1 / 6 / 2))
    assert wave_distance([1e300, 1e300], [1, 1]) == 0


@pytest.mark.parametrize("wave", [[], [0.0], [-1.0, 2.0], [math.nan], [math.inf, 1.0]])
def test_unusable_waves(wave: list[float]) -> None:
    with pytest.raises(ValueError, match="wave_distance expects"):
        wave_distance(wave, [1.0])
