"""Risk in the caches: the numbers are true, rows are independent, and a guard keeps its bound."""

import re

import pytest
import torch

from hf_reasoncache import Protect, ReasonAllocCache
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.risk import Probes, Risk
from hf_reasoncache.scorers import RKV, Random
from tests.support.attention_reference import outputs
from tests.support.caches import BRANCHED, CLASSES, exact_cache, make_cache
from tests.support.driver import Driver, now_held
from tests.support.models import LAYERS, build, prompt

MEASURED = {
    "reason_alloc": dict(risk=True, scorer=Random()),
    "sliding_window": dict(risk=True, scorer=RKV(queries=3)),
}


def snapshot(layer):
    """Tokens `[B, H]` of a layer by column, and its newest queries."""
    pool = layer.store.pool
    slots, offset = pool.slots(torch.arange(pool.length.shape[0]))
    at = pool.fields["positions"][slots].long().masked_fill(offset < 0, -1)
    keys, values = pool.fields["keys"][slots], pool.fields["values"][slots]
    queries = layer.queries.last()
    return at, keys, values, None if queries is None else queries[:, :, -8:]


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("kind", CLASSES)
def test_risk_is_the_difference_that_the_eviction_makes(name, kind):
    model, inputs = build(name), prompt()
    # Phases of their own keep windows of a row apart: one eviction per layer and step.
    cache = make_cache(kind, model, **MEASURED[kind])
    ours = [index for index, each in enumerate(cache.layers) if hasattr(each, "store")]
    driver = Driver(model, cache, inputs["attention_mask"])
    logits, checked = driver(inputs["input_ids"]), 0
    for _ in range(40):
        before = {i: (snapshot(cache.layers[i]), len(cache.layers[i].risk)) for i in ours}
        logits = driver(logits[:, -1:].argmax(-1))
        for i, ((at, keys, values, queries), known) in before.items():
            log = cache.layers[i].risk
            heads, held = at.shape[1], now_held(cache, i)
            for entry in range(known, len(log)):
                row = int(log.rows[entry])
                asked = torch.arange(driver.seen - 9, driver.seen - 1)
                for head in range(heads):
                    own = at[row, head]
                    keep = torch.isin(own, torch.tensor(held[row][head]))
                    group = queries[row].unflatten(0, (heads, -1))[head]
                    sinks = getattr(model.model.layers[i].self_attn, "sinks", None)
                    if sinks is not None:
                        sinks = sinks.detach().view(heads, -1)[head]
                    full, kept, mass = outputs(
                        group,
                        asked,
                        keys[row, head],
                        values[row, head],
                        own,
                        keep,
                        16**-0.5,
                        sinks=sinks,
                    )
                    error = (kept - full).norm() / full.norm()
                    assert float(log.error[entry, head]) == pytest.approx(float(error), abs=1e-5)
                    assert float(log.mass[entry, head]) == pytest.approx(
                        float(mass.mean()), abs=1e-5
                    )
                    checked += 1
    assert checked >= 12


@pytest.mark.parametrize("kind", CLASSES)
def test_measuring_changes_nothing_and_rows_are_independent(kind):
    model, inputs = build("llama"), prompt(batch=3, padding=(0, 7, 16))

    def run(ids, mask, **changes):
        cache = make_cache(kind, model, **changes)
        out = model.generate(ids, attention_mask=mask, **cache_kwarg(cache), max_new_tokens=50)
        return out[:, ids.shape[1] :], [layer.risk for layer in cache.layers]

    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    plain, nothing = run(ids, mask)
    tokens, logs = run(ids, mask, risk=True)
    assert torch.equal(plain, tokens) and not any(map(len, nothing))
    for row, pad in enumerate((0, 7, 16)):
        _, alone = run(ids[row : row + 1, pad:], mask[row : row + 1, pad:], risk=True)
        for log, own in zip(logs, alone, strict=True):
            torch.testing.assert_close(log.of_row(row).error, own.error)
            assert torch.equal(log.of_row(row).columns - pad, own.columns)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_past_of_a_row_goes_with_it(kind):
    model, inputs = build("llama"), prompt()
    cache = make_cache(kind, model, risk=True)
    driver = Driver(model, cache, inputs["attention_mask"])
    driver.greedy(driver(inputs["input_ids"]), 40)
    log = cache.layers[0].risk
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    for row in range(2):
        assert torch.equal(cache.layers[0].risk.of_row(row).error, log.of_row(1).error)
    cache.reset()
    assert len(cache.layers[0].risk) == 0


def test_assisted_decoding_measures_what_plain_decoding_does():
    model = build("llama")
    inputs = {key: value[:1] for key, value in prompt().items()}

    def run(**more):
        cache = make_cache("reason_alloc", model, risk=True, protect=Protect(prompt_length=21))
        model.generate(**inputs, **more, **cache_kwarg(cache), max_new_tokens=60)
        return cache.layers[1].risk

    plain, assisted = run(), run(assistant_model=build("llama"))
    shared = min(len(plain), len(assisted))
    assert shared >= 4
    torch.testing.assert_close(plain.error[:shared], assisted.error[:shared])


# ---------------------------------------------------------------------------------------- the guard


@pytest.mark.parametrize("action", ["shrink", "abstain", "move"])
def test_a_guard_never_exceeds_budget_and_buffer(action):
    model, inputs = build("llama"), prompt(batch=3, padding=(0, 7, 16))
    settings = dict(budget=32, buffer=16, window=4, protect=False, head_budgets=False)
    worst = {}
    for risk in (Risk(), Risk(0.2, action)):
        cache = ReasonAllocCache(model.config, **settings, risk=risk)
        driver = Driver(model, cache, inputs["attention_mask"])
        logits = driver(inputs["input_ids"])
        for _ in range(80):
            logits = driver(logits[:, -1:].argmax(-1))
            for layer in cache.report().layers:
                assert max(max(row) for row in layer.held) <= 48
                assert {slots for row in layer.capacity for slots in row} == {48}
        report = cache.report()
        worst[risk] = float(report.errors.quantile(0.9)), report.evictions
    (before, evictions), (after, guarded) = worst.values()
    assert after < before, "the guard lowers the error"
    assert evictions <= guarded <= 4 * evictions


def test_a_guard_of_windows_keeps_its_share_and_the_bound():
    model, inputs = build("llama"), prompt()
    settings = dict(window=16, ratio=0.25, recent=4)
    errors = {}
    for limit in (None, 0.1):
        cache = make_cache("sliding_window", model, **settings, risk=Risk(limit))
        out = model.generate(**inputs, **cache_kwarg(cache), max_new_tokens=100)
        errors[limit] = float(cache.report().errors.mean())
        for layer in range(LAYERS):
            phase = layer * 16 // LAYERS
            for head in now_held(cache, layer)[0]:
                for end in range(48 + phase, out.shape[1] - 5, 16):
                    kept = sum(end - 16 <= at < end for at in head)
                    assert kept == 4 if limit is None else 4 <= kept <= 4 + 9
    assert errors[0.1] < errors[None]
    cache = make_cache("sliding_window", model, **settings, max_budget=40, risk=0.0)
    driver = Driver(model, cache, inputs["attention_mask"])
    logits = driver(inputs["input_ids"])
    for _ in range(100):
        logits = driver(logits[:, -1:].argmax(-1))
        for layer in cache.report().layers:
            assert max(sum(row) for row in layer.held) <= 2 * (40 + 16)


def test_a_guard_never_evicts_what_is_protected():
    model, inputs = build("llama"), prompt(tokens=30)
    for action in ("shrink", "move"):
        cache = ReasonAllocCache(
            model.config,
            budget=20,
            buffer=16,
            window=4,
            protect=[(2, 9)],
            risk=Risk(0.1, action),
        )
        model.generate(**inputs, **cache_kwarg(cache), max_new_tokens=60)
        assert bool((cache.keep_rates([(2, 9)]) == 1).all())


# ------------------------------------------------------------------------------------------- report


def test_report_shows_the_risk_and_says_what_it_is_not():
    model = build("llama")
    cache = make_cache("reason_alloc", model, risk=True)
    assert "no eviction was measured yet" in str(cache.report())
    model.generate(**prompt(), **cache_kwarg(cache), max_new_tokens=60)
    report = cache.report()
    text = str(report)
    assert "not the quality of the answer" in text
    assert f"{float(report.errors.max()):.1%} (worst" in text
    assert max(map(len, text.splitlines())) <= 80
    for line, layer in zip(text.splitlines()[-LAYERS:], report.layers, strict=True):
        assert line.endswith(f" {float(layer.risk.error.quantile(0.9)):.1%}")
    assert report.errors.numel() == sum(layer.risk.error.numel() for layer in report.layers)
    log = report.layers[0].risk
    assert torch.equal(log.quantile(1.0), log.error.amax(0))
    assert log.latest.shape == (2,) and bool((log.latest <= log.quantile(1.0)).all())
    assert make_cache("reason_alloc", model).report().errors is None


@pytest.mark.parametrize("kind", CLASSES)
def test_report_warns_when_a_budget_never_evicted(kind):
    model = build("llama")
    large = {"reason_alloc": {"budget": 400}, "sliding_window": {"window": 128}}
    cache = make_cache(kind, model, **large[kind])
    assert not cache.report().nothing_evicted, "nothing was seen yet"
    model.generate(**prompt(), **cache_kwarg(cache), max_new_tokens=20)
    assert cache.report().nothing_evicted
    assert "WARNING: nothing was evicted" in str(cache.report())
    assert max(map(len, str(cache.report()).splitlines())) <= 80
    for other in (make_cache(kind, model), exact_cache(kind, model)):
        model.generate(**prompt(), **cache_kwarg(other), max_new_tokens=40)
        assert not other.report().nothing_evicted


def test_arguments():
    model = build("llama")
    for kind in CLASSES:
        for risk in (-1, "low", Probes()):
            said = f"risk: expected the limit as a finite number >= 0, got {risk!r}"
            with pytest.raises(ValueError, match=re.escape(said)):
                make_cache(kind, model, risk=risk)
        for risk in (None, False, Risk(measure=False)):
            assert make_cache(kind, model, risk=risk).layers[0].policy.risk is None


@pytest.mark.parametrize("risk", [True, 0.1, Risk(measure=False, probes=Probes())], ids=str)
def test_branches_refuse_what_they_cannot_measure(risk):
    with pytest.raises(ValueError, match="the prompt of a branch is not in it"):
        make_cache(BRANCHED, build("llama"), risk=risk)
