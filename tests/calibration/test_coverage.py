"""Coverage against attention maps of the eager implementation, counted one by one in float64."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from hf_reasoncache.calibration.coverage import RECENCY_BINS, Coverage
from hf_reasoncache.calibration.estimate import Record
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import BUILDERS, build, stock_keys
from tests.support.traces import make_trace, token_ids
from triton_ops.redundancy import redundancy

SETTINGS = Coverage(interval=16, queries=3, sinks=2)
COMPLETION = 40  # two intervals and a rest


def brute_force(name: str, trace: Trace) -> dict[str, torch.Tensor]:
    """All samples of every statistic: [L, H_kv, queries, ...]."""
    model = build(name, attention="eager")
    ids, cache = token_ids(trace), DynamicCache(config=model.config)
    with torch.no_grad():
        maps = model(ids, **cache_kwarg(cache), output_attentions=True).attentions
    geometry = Geometry.of(model.config)
    start, heads = len(trace.prompt), geometry.kv_heads
    ends = [start + 16, start + 32]
    samples: dict[str, list] = {name: [] for name in ("tokens", "entropy", "sink", "recency")}
    repeated = []
    for layer in geometry.full_attention_layers:
        rows: dict[str, list] = {name: [] for name in samples}
        for grouped in maps[layer][0].double().chunk(heads):
            found: dict[str, list] = {name: [] for name in samples}
            for query in (place for end in ends for place in range(end - 3, end)):
                row = grouped[:, query].mean(0).tolist()
                # float32 sums, as the measurement has them, decide where a share is reached.
                total = math.fsum(row)
                counts = []
                for share in SETTINGS.all_shares:
                    mass, count = 0.0, 0
                    for value in sorted(row, reverse=True):
                        mass, count = mass + value, count + 1
                        if mass >= share * total:
                            break
                    counts.append(count)
                bins = [0.0] * RECENCY_BINS
                for key, value in enumerate(row[: query + 1]):
                    bins[int(math.log2(query - key + 1))] += value
                found["tokens"].append(counts)
                found["entropy"].append(-math.fsum(v * math.log(v) for v in row if v > 0))
                found["sink"].append(sum(row[:2]))
                found["recency"].append(bins)
            for each in samples:
                rows[each].append(found[each])
        for each in samples:
            samples[each].append(rows[each])
        keys = stock_keys(model, cache.layers[layer])
        repeated.append(
            [
                [redundancy(keys[:, h : h + 1, :end], torch.ones(1, 1, end).bool())[0].mean()] * 3
                for h in range(heads)
                for end in ends
            ]
        )
    result = {each: torch.tensor(values).double() for each, values in samples.items()}
    result["redundancy"] = torch.tensor(repeated).view(len(repeated), heads, 6).double()
    return result


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_statistic_equals_counting_by_hand(name: str) -> None:
    trace = make_trace(completion=COMPLETION)
    record = SETTINGS.measure(build(name), trace)
    expected = brute_force(name, trace)
    assert record["count"].tolist() == [6] * len(expected["sink"])
    for each, samples in expected.items():
        for statistic, wanted in (("mean", samples.mean(2)), ("variance", samples.var(2))):
            torch.testing.assert_close(
                record[f"{each}.{statistic}"], wanted, rtol=1e-4, atol=1e-5, msg=lambda m: m
            )


@pytest.mark.parametrize(("completion", "steps"), [(16, 0), (17, 1), (32, 1), (33, 2)])
def test_only_full_intervals_are_measured(completion: int, steps: int) -> None:
    record = SETTINGS.measure(build("llama"), make_trace(completion=completion))
    assert record["count"].tolist() == [3 * steps] * 3
    assert all(bool(tensor.isfinite().all()) for tensor in record.values())


def test_demand_is_the_mean_over_heads_and_prompts_with_its_error() -> None:
    model = build("llama")
    traces = [make_trace(completion=n, seed=n) for n in (20, 40, 60, 8)]
    records: list[Record] = [SETTINGS.measure(model, trace) for trace in traces]
    found = SETTINGS.estimate(records, traces)
    by_prompt = torch.stack([r["tokens.mean"][..., 0].mean(1) for r in records[:3]])
    torch.testing.assert_close(found.demand, by_prompt.mean(0))
    torch.testing.assert_close(found.standard_error, by_prompt.std(0) / 3**0.5)
    assert found.head_demand is not None
    torch.testing.assert_close(found.head_demand.mean(1), found.demand)
    with pytest.raises(ValueError, match=r"at least 2 completions .* got 1 of 2"):
        SETTINGS.estimate(records[2:], traces[2:])


@pytest.mark.parametrize(
    "wrong", [{"queries": 0}, {"queries": 129}, {"mass": 1.0}, {"shares": (0.0,)}, {"sinks": -1}]
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        Coverage(**wrong)
