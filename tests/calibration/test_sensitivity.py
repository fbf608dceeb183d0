"""Sensitivity: the right layer is squeezed, settings follow the traces, curves become demand."""

from __future__ import annotations

import pytest
import torch

from hf_reasoncache.calibration import squeeze
from hf_reasoncache.calibration.sensitivity import Eviction, Sensitivity
from hf_reasoncache.calibration.squeeze import output_error
from hf_reasoncache.calibration.tune import Tune
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.scorers import RKV
from tests.support.models import build
from tests.support.traces import make_trace

EVICTION = Eviction(scorer=RKV(queries=4), buffer=6, window=4)


@pytest.mark.parametrize("name", ["llama", "qwen2_sliding"])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_one_layer_at_a_time_is_squeezed(name: str, rows: int) -> None:
    model, trace = build(name), make_trace()
    geometry = Geometry.of(model.config)
    layers = len(geometry.full_attention_layers)
    settings = Sensitivity(budgets=(8, 20), budget=12, eviction=EVICTION, rows=rows, every=1)
    found = settings.measure(model, trace)["divergence"]
    assert found.shape == (layers, 2)
    for layer in range(layers):
        for place, budget in enumerate(settings.budgets):
            kept = torch.full((1, layers, geometry.kv_heads), trace.length)
            kept[0, layer] = budget
            alone = output_error(model, trace, EVICTION.policy(), kept)
            torch.testing.assert_close(found[layer, place], alone[0], rtol=1e-4, atol=1e-7)


def test_single_heads_are_squeezed_too() -> None:
    model, traces = build("llama"), [make_trace(seed=seed) for seed in (1, 2)]
    settings = Sensitivity(budgets=(8, 20), budget=12, eviction=EVICTION, heads=True, every=1)
    records = [settings.measure(model, trace) for trace in traces]
    assert records[0]["head_divergence"].shape == (3, 2, 2)
    whole = Sensitivity(budgets=(8, 20), budget=12, eviction=EVICTION, every=1)
    expected = whole.measure(model, traces[0])["divergence"]
    torch.testing.assert_close(records[0]["divergence"], expected, rtol=1e-4, atol=1e-7)
    kept = torch.full((1, 3, 2), traces[0].length)
    kept[0, 2, 1] = 20
    alone = output_error(model, traces[0], EVICTION.policy(), kept)
    torch.testing.assert_close(
        records[0]["head_divergence"][2, 1, 1], alone[0], rtol=1e-4, atol=1e-7
    )
    found = settings.estimate(records, traces)
    assert found.head_demand is not None
    torch.testing.assert_close(found.head_demand.mean(1), found.demand)


def test_what_is_not_said_follows_from_the_median_trace() -> None:
    traces = [make_trace(completion=n) for n in (11, 139, 300)]  # 160 tokens in the middle
    assert Sensitivity(eviction=EVICTION).resolve(traces).budgets == (10, 20, 40, 80)
    assert Sensitivity(eviction=EVICTION).resolve(traces).budget == 40
    wide = Sensitivity(eviction=Eviction(window=30, buffer=16)).resolve(traces)
    assert wide.budgets == (31, 40, 80) and wide.budget == 40
    kept = Eviction(window=4, buffer=16, protect_prompt=True)  # 21 tokens of each prompt
    assert Sensitivity(eviction=kept).resolve(traces).budgets == (29, 38, 55, 90)
    assert Tune(eviction=kept).resolve(traces).budget == 55
    with pytest.raises(ValueError, match=r"longer than 329 tokens .* got at most 321: nothing"):
        Sensitivity(budgets=(201,)).resolve(traces)
    own = Sensitivity(budgets=(9,), budget=10, eviction=EVICTION)
    assert own.resolve(traces) == own


def test_curves_become_tokens_that_add_up_to_the_budget() -> None:
    traces = [make_trace(completion=n) for n in (60, 70, 80)]
    settings = Sensitivity(budgets=(10, 20, 40), budget=30, eviction=EVICTION)
    needy, easy = torch.tensor([3.0, 1.0, 0.1]), torch.tensor([0.01, 0.0, 0.0])
    same = [{"divergence": torch.stack([easy, needy, easy]).double()}] * 3
    found = settings.estimate(same, traces)
    assert found.demand.sum() == 90
    assert found.demand[1] > 2 * found.demand[0] == 2 * found.demand[2]
    assert found.standard_error.tolist() == [0.0] * 3
    assert found.rule.exponent == 1.0
    other = [*same[:2], {"divergence": torch.stack([needy, easy, easy]).double()}]
    unsure = settings.estimate(other, traces)
    assert unsure.standard_error[0] > 0
    assert torch.equal(unsure.standard_error, settings.estimate(other, traces).standard_error)
    with pytest.raises(ValueError, match="at least 2 prompts, got 1"):
        settings.estimate(same[:1], traces[:1])


def test_the_cost_is_what_the_blocks_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    # Known, instead of tried on a few tokens for each text.
    monkeypatch.setattr(squeeze, "_rows_may_join", lambda model, block: True)
    model, traces = build("llama"), [make_trace(completion=n) for n in (40, 12)]
    settings = Sensitivity(budgets=(8, 20), budget=12, eviction=EVICTION, heads=True, rows=5)
    computed = 0
    for block in model.model.layers:

        def count(block: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
            nonlocal computed
            computed += output.shape[0] * output.shape[1]

        block.register_forward_hook(count)
    for trace in traces:
        settings.measure(model, trace)
    cost = settings.cost(traces, Geometry.of(model.config))
    assert cost == pytest.approx(computed / len(model.model.layers), abs=1)


@pytest.mark.parametrize("budgets", [(), (8, 20)])
def test_no_answers_cost_more_than_the_bound(budgets: tuple[int, ...]) -> None:
    geometry = Geometry((0, 1, 2), kv_heads=2, head_size=16)
    settings = Sensitivity(budgets=budgets, eviction=EVICTION, rows=2)
    bound = settings.bound([21, 21], 200, geometry)
    assert 0 < bound < 10**5
    for lengths in ([200, 200], [200, 30], [13, 40], [60, 59]):
        traces = [make_trace(completion=n) for n in lengths]
        assert settings.resolve(traces).cost(traces, geometry) <= bound


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": 0}, "rows: expected an integer >= 1"),
        ({"every": 0}, "every: expected an integer >= 1"),
        ({"budget": 0}, "budget: expected an integer >= 1"),
        ({"budgets": (20, 10)}, "ascending"),
        ({"budgets": (8, 20)}, "more than the window of 8"),
        ({"budgets": (20, 40), "budget": 19}, "smallest of the measured budgets, 20, .* got 19"),
        ({"budgets": (20, 40), "budget": 20}, "nothing to share out"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sensitivity(**wrong)
