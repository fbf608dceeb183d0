"""Shadow probes: the error they report is the true one, in every mode, and they change nothing."""

import pytest
import torch

from hf_reasoncache import Protect
from hf_reasoncache.observers import Observer
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.risk import Probes, Risk
from tests.support.attention_reference import outputs
from tests.support.caches import CLASSES, exact_cache, make_cache
from tests.support.driver import Driver, now_held
from tests.support.models import LAYERS, build, prompt

PROBED = Risk(measure=False, probes=Probes(heads=1.0, interval=5))


class Spy(Observer):
    """All queries, keys and values that a model hands to one layer."""

    def __init__(self, layer):
        self.queries, self.keys, self.values = [], [], []
        (self.shadow,) = layer.observers
        layer.observers += (self,)

    def attended(self, layer, new):
        self.queries.append(new.query)
        self.keys.append(new.keys)
        self.values.append(new.values)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_probe_is_the_difference_to_all_tokens(name, kind):
    model, inputs = build(name), prompt()
    cache = make_cache(kind, model, risk=PROBED)
    ours = [index for index, each in enumerate(cache.layers) if hasattr(each, "store")]
    spy = Spy(cache.layers[ours[-1]])
    driver = Driver(model, cache, inputs["attention_mask"])
    logits, checked = driver(inputs["input_ids"]), 0
    for _ in range(40):
        known = len(spy.shadow.log)
        logits = driver(logits[:, -1:].argmax(-1))
        log = spy.shadow.log
        if len(log) == known:
            continue
        keys, values = (torch.cat(x, 2) for x in (spy.keys, spy.values))
        sinks = getattr(model.model.layers[ours[-1]].self_attn, "sinks", None)
        for entry, row in enumerate(range(2), known):
            assert log.rows[entry] == row and log.columns[entry] == driver.seen
            for head, held in enumerate(now_held(cache, ours[-1])[row]):
                at = torch.arange(driver.seen).where(driver.mask[row].bool(), -1)
                group = spy.queries[-1][row].unflatten(0, (keys.shape[1], -1))[head]
                full, kept, mass = outputs(
                    group,
                    torch.tensor([driver.seen - 1]),
                    keys[row, head],
                    values[row, head],
                    at,
                    torch.isin(at, torch.tensor(held)),
                    16**-0.5,
                    sinks=None if sinks is None else sinks.detach().view(2, -1)[head],
                )
                error = (kept - full).norm() / full.norm()
                assert float(log.error[entry, head]) == pytest.approx(float(error), abs=1e-5)
                assert float(log.mass[entry, head]) == pytest.approx(float(mass.mean()), abs=1e-5)
                checked += 1
    assert checked >= 28


@pytest.mark.parametrize("kind", CLASSES)
def test_probes_change_nothing_and_are_zero_where_nothing_is_evicted(kind):
    model = build("llama")
    plain = make_cache(kind, model)
    probed = make_cache(kind, model, risk=PROBED)
    out = [
        model.generate(**prompt(), **cache_kwarg(cache), max_new_tokens=40)
        for cache in (plain, probed)
    ]
    assert torch.equal(*out)
    report = probed.report()
    assert report.probe_errors.numel() > 20 and float(report.probe_errors.max()) > 0.05
    assert "shadows hold" in str(report) and max(map(len, str(report).splitlines())) <= 80
    tokens = 2 * 2 * 60 * 16 * 4 * 2 * LAYERS
    assert sum(layer.shadow_bytes for layer in report.layers) >= 0.9 * tokens
    assert report.total_bytes == plain.report().total_bytes, "a shadow is no part of the cache"
    assert plain.report().probe_errors is None
    large = {"reason_alloc": {"budget": 400}, "sliding_window": {"window": 128}}
    whole = make_cache(kind, model, risk=PROBED, **large[kind])
    model.generate(**prompt(), **cache_kwarg(whole), max_new_tokens=20)
    assert float(whole.report().probe_errors.max()) < 1e-6


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"assistant_model": True}], ids=str)
def test_a_shadow_follows_rows_and_drafts(mode):
    model = build("llama")
    inputs = {key: value[:1] for key, value in prompt().items()}
    if mode.get("assistant_model"):
        assistant = build("llama")
        with torch.no_grad():
            assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.02)
        mode = {"assistant_model": assistant}

    def run(**more):
        cache = make_cache("reason_alloc", model, protect=Protect(prompt_length=21), risk=PROBED)
        out = model.generate(**inputs, **more, **cache_kwarg(cache), max_new_tokens=60)
        return out, cache

    out, cache = run(**mode)
    if "num_beams" not in mode:
        assert torch.equal(out, run()[0])
    for layer in cache.layers:
        shadow, pool = layer.observers[0], layer.store.pool
        assert shadow.columns == layer.seen == int(layer.store.pool.fields["positions"].max()) + 1
        keys = torch.cat([chunk[0] for chunk in shadow._chunks], 2)
        slots, offset = pool.slots(torch.arange(pool.length.shape[0]))
        at = pool.fields["positions"][slots].long()
        held = pool.fields["keys"][slots]
        copies = keys.gather(2, at[..., None].expand(-1, -1, -1, 16))
        torch.testing.assert_close(held[offset >= 0], copies[offset >= 0])


def test_crop_and_rows():
    model, inputs = build("llama"), prompt()
    cache = make_cache("reason_alloc", model, risk=PROBED)
    driver = Driver(model, cache, inputs["attention_mask"])
    driver.greedy(driver(inputs["input_ids"]), 30)
    log = cache.layers[0].observers[0].log
    cache.crop(-6)
    driver.seen -= 6
    assert cache.layers[0].observers[0].columns == driver.seen
    assert (
        int(cache.layers[0].observers[0].log.columns.max()) <= driver.seen < int(log.columns.max())
    )
    cache.batch_select_indices(torch.tensor([1]))
    driver.rows([1])
    driver.greedy(driver(torch.full((1, 1), 5)), 10)
    assert set(cache.layers[0].observers[0].log.rows.tolist()) == {0}
    cache.reset()
    assert cache.layers[0].observers[0].log is None


def test_heads_are_drawn_by_seed():
    heads = [[Probes(0.3, seed=s).draw(layer, 8)[0] for layer in range(40)] for s in (0, 0, 1)]
    assert heads[0] == heads[1] != heads[2]
    share = sum(map(len, heads[0])) / 320
    assert 0.2 < share < 0.4
    assert Probes(1.0).draw(0, 4)[0] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"heads": 0}, r"heads as a number in \(0, 1\], got 0"),
        ({"heads": "all"}, "got 'all'"),
        ({"interval": 0}, "interval as an integer >= 1, got 0"),
        ({"seed": -1}, "seed as an integer >= 0, got -1"),
    ],
    ids=repr,
)
def test_bad_settings(arguments, said):
    with pytest.raises(ValueError, match=said):
        Probes(**arguments)


def test_captured_steps_are_refused():
    model = build("llama")
    cache = make_cache("reason_alloc", model, risk=PROBED)
    model(**prompt(), **cache_kwarg(cache))
    with pytest.raises(ValueError, match="captured steps, which a shadow cannot follow"):
        cache.layers[0].prepare()
    exact = exact_cache("reason_alloc", model)
    assert exact.report().probe_errors is None
