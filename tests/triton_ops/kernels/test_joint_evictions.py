"""Evicting from all layers at once is what each layer would have done."""

import pytest
import torch

from hf_reasoncache import ReasonAllocCache, joint_evictions
from hf_reasoncache.scorers import RKV, KeyNorm, Random, SnapKV
from tests.support.models import prompt
from tests.support.ops.generation import generate, small_llama

SETTINGS = dict(budget=6, buffer=3, window=2, profile=[1.0, 1.3], protect=False)


@pytest.fixture
def evicted(monkeypatch):
    """Layers and rows of each joint eviction."""
    seen, run = [], joint_evictions.JointEvictions._evict

    def noted(self, number, layers, rows):
        seen.append(([layer.index for layer in layers], rows.tolist()))
        run(self, number, layers, rows)

    monkeypatch.setattr(joint_evictions.JointEvictions, "_evict", noted)
    return seen


def outcome(model, inputs, device, **settings):
    """Tokens, what is held, counts, and statistics of the tokens held in order of position."""
    cache = ReasonAllocCache(model.config, **settings)
    tokens = generate(model, cache, inputs)
    report, pools = cache.report(), [layer.store.tokens for layer in cache.own_layers]
    notes = []
    for pool in pools:
        slots, offset = pool.slots(torch.arange(pool.length.shape[0]))
        order = pool.take("positions", slots).argsort(-1)
        for name in [name for name in pool.fields if name not in ("keys", "values")]:
            # Scales are two numbers per token.
            for part in pool.take(name, slots)[..., None].flatten(3).unbind(-1):
                notes.append(part.masked_fill(offset < 0, 0).gather(-1, order).cpu())
        assert torch.equal(pool.device_length.cpu(), pool.length)
    held = [cache.held_positions(layer.index) for layer in cache.own_layers]
    return tokens.cpu(), held, report.evictions, report.evicted, notes


def same(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1:4] == other[1:4]
    for mine, its in zip(one[4], other[4], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scorer", "storage"),
    [(RKV(), None), (SnapKV(), None), (KeyNorm(), None), (RKV(), "fp8"), (KeyNorm(), "fp8-values")],
    ids=repr,
)
def test_it_is_what_the_layers_do_alone(scorer, storage, device, evicted, monkeypatch):
    model, inputs = small_llama().to(device), prompt(tokens=11, padding=(0, 3))
    inputs = {name: each.to(device) for name, each in inputs.items()}
    settings = SETTINGS | dict(scorer=scorer, storage=storage)
    together = outcome(model, inputs, device, **settings)
    assert [layers for layers, _ in evicted] == [[0, 1]] * len(evicted)
    assert {tuple(rows) for _, rows in evicted} == {(0,), (1,)}, "rows are due at their own steps"
    monkeypatch.setattr(joint_evictions.JointEvictions, "run", lambda self: None)
    same(together, outcome(model, inputs, device, **settings))


def test_what_does_not_fit_at_once_goes_one_after_the_other(device, evicted, monkeypatch):
    model, inputs = small_llama().to(device), prompt(batch=1, tokens=11)
    inputs = {name: each.to(device) for name, each in inputs.items()}
    together = outcome(model, inputs, device, **SETTINGS)
    count = len(evicted)
    assert count
    monkeypatch.setattr(joint_evictions, "MOST_BYTES", 1)
    same(together, outcome(model, inputs, device, **SETTINGS))
    assert [layers for layers, _ in evicted[count:]] == [[0], [1]] * count


@pytest.mark.parametrize(
    "changes",
    [{"scorer": Random()}, {"head_budgets": True}, {"risk": True}, {"budget": None}],
    ids=str,
)
def test_other_caches_leave_it_to_their_layers(changes, device, evicted):
    model, inputs = small_llama().to(device), prompt(batch=1, tokens=11)
    inputs = {name: each.to(device) for name, each in inputs.items()}
    settings = SETTINGS | changes
    if settings["budget"] is None:
        settings = dict(budget=None)
    outcome(model, inputs, device, **settings)
    assert not evicted


def test_a_cache_that_is_made_new_finds_its_new_pools(device, evicted):
    model, inputs = small_llama().to(device), prompt(batch=1, tokens=11)
    inputs = {name: each.to(device) for name, each in inputs.items()}
    cache = ReasonAllocCache(model.config, **SETTINGS)
    first = generate(model, cache, inputs)
    count = len(evicted)
    cache.reset()
    assert torch.equal(generate(model, cache, inputs), first)
    assert len(evicted) == 2 * count > 0
