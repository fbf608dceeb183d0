"""The check at the end of a calibration: what it measures, and what it may conclude."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_reasoncache.budgets import BudgetRule
from hf_reasoncache.calibration.estimate import Estimate
from hf_reasoncache.calibration.sensitivity import Eviction
from hf_reasoncache.calibration.squeeze import output_error
from hf_reasoncache.calibration.together import Check, Comparison
from hf_reasoncache.scorers import RKV
from tests.support.models import build
from tests.support.traces import make_trace

EVICTION = Eviction(scorer=RKV(queries=4), buffer=6, window=4)
ESTIMATE = Estimate(torch.tensor([1.0, 4.0, 2.0]).double(), torch.zeros(3), BudgetRule())
CHECK = Check(budget=24, eviction=EVICTION, every=1)


def test_the_split_of_the_profile_and_equal_layers_are_measured() -> None:
    model, trace = build("llama"), make_trace()
    found = CHECK.measure(model, trace, ESTIMATE)["divergence"]
    splits = torch.tensor([BudgetRule().layer_budgets([1.0, 4.0, 2.0], 24, floor=4), [24] * 3])
    kept = splits[:, :, None].expand(-1, -1, 2)
    expected = output_error(model, trace, EVICTION.policy(), kept)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert found[0] != found[1]
    equal = replace(ESTIMATE, demand=torch.ones(3).double())
    same = CHECK.measure(model, trace, equal)["divergence"]
    assert same[0] == same[1] and CHECK.outcome([{"divergence": same}] * 2).difference == 0


def test_the_verdict_is_what_the_interval_allows() -> None:
    def verdict(*differences: float) -> str:
        errors = [{"divergence": torch.tensor([1.0 + each, 1.0])} for each in differences]
        return CHECK.outcome(errors).verdict

    assert verdict(-0.3, -0.2, -0.4, -0.3) == "better"
    assert verdict(0.3, 0.2, 0.4, 0.3) == "worse"
    assert verdict(-0.3, 0.2, -0.4, 0.5) == "no difference shown"
    said = str(Comparison("equal layers", -0.25, -0.5, -0.125))
    assert said == (
        "against equal layers: better, -0.25 nats per token (95% interval -0.5 to -0.125)"
    )


def test_texts_that_never_evict_are_not_compared() -> None:
    model, trace = build("llama"), make_trace()
    equal = replace(ESTIMATE, demand=torch.ones(3).double())
    first = trace.length - 1 - EVICTION.buffer
    for budget, evicts in ((first - 1, True), (first, False)):
        check = replace(CHECK, budget=budget)
        assert check.resolve([trace]) == (check if evicts else None)
        assert bool(check.measure(model, trace, equal)["divergence"].any()) is evicts
    default = replace(CHECK, budget=None).resolve([trace])
    assert default is not None and default.budget == EVICTION.budget([trace], 4)
    with pytest.raises(ValueError, match="expected a budget, got None"):
        replace(CHECK, budget=None).measure(model, trace, ESTIMATE)


@pytest.mark.parametrize("wrong", [{"budget": 0}, {"rows": 0}, {"every": 0}])
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected an integer >= 1"):
        Check(**wrong)
