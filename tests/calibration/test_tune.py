"""Tuning: which rules are tried, what decides, and how sure it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from hf_reasoncache.budgets import BudgetRule
from hf_reasoncache.calibration.bootstrap import mean_interval
from hf_reasoncache.calibration.estimate import Estimate
from hf_reasoncache.calibration.sensitivity import Eviction
from hf_reasoncache.calibration.squeeze import output_error
from hf_reasoncache.calibration.tune import Tune, choose
from hf_reasoncache.scorers import RKV
from tests.support.models import build
from tests.support.traces import make_trace

EVICTION = Eviction(scorer=RKV(queries=4), buffer=6, window=4)
ESTIMATE = Estimate(torch.tensor([1.0, 4.0, 2.0]).double(), torch.zeros(3), BudgetRule())
TUNE = Tune(budget=24, eviction=EVICTION)


def test_the_default_comes_first_and_no_split_twice() -> None:
    found = TUNE.candidates(ESTIMATE)
    assert next(iter(found.values())) == BudgetRule()
    assert (24, 24, 24) in found
    assert all(sum(split) == 72 and min(split) >= EVICTION.window for split in found)
    assert len(found) > 5
    for split, rule in found.items():
        budgets = rule.layer_budgets([1.0, 4.0, 2.0], 24, floor=EVICTION.window)
        assert tuple(budgets) == split


def test_a_rule_is_measured_as_the_cache_would_use_it() -> None:
    model, trace = build("llama"), make_trace()
    rules = [BudgetRule(), BudgetRule(1.0, 0.1, 3.0)]
    for protect in (False, True):
        eviction = Eviction(RKV(queries=4), buffer=6, window=4, protect_prompt=protect)
        tune = Tune(budget=30, eviction=eviction, rows=1)
        found = tune.measure(model, trace, ESTIMATE, rules)["divergence"]
        floor = 4 + 21 * protect
        splits = [rule.layer_budgets([1.0, 4.0, 2.0], 30, floor=floor) for rule in rules]
        budgets = torch.tensor(splits)[:, :, None].expand(-1, -1, 2)
        expected = output_error(model, trace, eviction.policy(), budgets)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def errors(prompts: int, means: list[float], noise: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(prompts, len(means), generator=generator)
    return torch.tensor(means) + noise * draws


def test_a_rule_that_is_better_on_every_prompt_is_adopted() -> None:
    candidates = TUNE.candidates(ESTIMATE)
    means = [1.0] * len(candidates)
    means[5] = 0.5
    found = choose(errors(12, means, 0.05), candidates)
    assert found.rule == found.best == list(candidates.values())[5]
    assert [each.verdict for each in found.comparisons] == ["better", "better"]
    assert found.comparisons[0].difference == pytest.approx(-0.5, abs=0.05)
    assert found.to_json()["adopted"] is True


def test_luck_is_not_adopted() -> None:
    """On noise alone, a choice that judged itself would look better every time."""
    candidates = TUNE.candidates(ESTIMATE)
    found = choose(errors(12, [1.0] * len(candidates), 0.3), candidates)
    default, uniform = found.comparisons
    assert found.divergence["best"] < found.divergence["default"] - 0.1
    assert default.verdict == uniform.verdict == "no difference shown"
    assert found.rule == BudgetRule() != found.best
    assert found.to_json()["adopted"] is False


def test_every_prompt_is_judged_by_the_choice_of_the_others() -> None:
    candidates = dict(list(TUNE.candidates(ESTIMATE).items())[:3])
    # Even prompts like the second split, odd ones the third.
    table = torch.tensor([[1.0, 0.0, 2.0], [1.0, 2.0, 0.0]] * 4)
    uniform = next(i for i, split in enumerate(candidates) if len(set(split)) == 1)
    found = choose(table, candidates)
    assert found.comparisons[0].difference == pytest.approx(1.0)
    assert found.comparisons[0].verdict == "worse"
    assert found.comparisons[1].difference == pytest.approx(2.0 - float(table[:, uniform].mean()))


def test_prompts_are_held_out_once_and_at_random() -> None:
    for count in (6, 24, 100):
        seen, held = TUNE.split(count)
        assert sorted(seen + held) == list(range(count))
        assert len(held) == max(4, round(count / 3))
        assert (seen, held) == TUNE.split(count)
    assert len({place % 3 for place in TUNE.split(24)[1]}) == 3
    with pytest.raises(ValueError, match="at least 6 prompts, 4 of them held out, got 5"):
        TUNE.split(5)


def test_the_interval_is_the_bootstraps() -> None:
    values = np.random.default_rng(1).exponential(size=40)
    low, high = mean_interval(torch.tensor(values))
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=2
    ).confidence_interval
    assert low == pytest.approx(expected.low, abs=0.02)
    assert high == pytest.approx(expected.high, abs=0.02)


@pytest.mark.parametrize(
    "wrong",
    [{"held_out": 0.0}, {"held_out": 1.0}, {"rows": 0}, {"budget": 0}, {"highs": (0.9,)}],
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expect"):
        Tune(**wrong)
