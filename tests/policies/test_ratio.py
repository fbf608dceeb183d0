"""A budget as a share of the tokens seen: how much rows hold, and what is refused."""

from __future__ import annotations

import pytest
import torch

from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache
from hf_reasoncache.evaluation import parse_spec
from hf_reasoncache.scorers import KeyNorm
from tests.support.caches import BRANCHED, make_cache
from tests.support.driver import Driver
from tests.support.models import HEADS, LAYERS, build, prompt
from tests.support.oracle import Recorder

BUFFER, LEAST = 8, 10


@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.parametrize("profile", [None, [1, 9, 4]], ids=str)
def test_rows_hold_their_share_of_their_own_tokens(protect: bool, profile) -> None:
    """Right after a compaction exactly that, and until the next one up to a buffer more."""
    model, inputs = build("llama"), prompt(batch=3, padding=(0, 7, 16))
    cache = ReasonAllocCache(
        model.config,
        ratio=0.4,
        min_budget=LEAST,
        buffer=BUFFER,
        window=4,
        protect=protect,
        profile=profile,
        scorer=KeyNorm(),
    )
    driver = Driver(model, cache, inputs["attention_mask"])
    own = inputs["attention_mask"].sum(-1)
    logits, compactions = driver(inputs["input_ids"]), 0
    before = torch.tensor([layer.held for layer in cache.report().layers])
    for step in range(1, 120):
        logits = driver(logits[:, -1:].argmax(-1))
        held = torch.tensor([layer.held for layer in cache.report().layers])
        for row in range(3):
            # The compaction comes before the new token, which is held in any case.
            seen = int(own[row]) + step - 1
            budget = max(int(0.4 * seen), LEAST + (int(own[row]) if protect else 0))
            compacted = (held[:, row] <= before[:, row]).all(-1)
            compactions += int(compacted.any())
            if compacted.any() and profile is None:
                assert held[compacted, row].unique().tolist() == [budget + 1], (row, step)
            assert held[:, row].float().mean() <= budget + BUFFER + 1
        before = held
    assert compactions > 20
    mean = held.float().mean((0, 2))
    assert ((0.4 * (own + 110)).floor() <= mean + BUFFER).all()
    if profile is not None:
        assert held[1].float().mean() > 1.3 * held[0].float().mean(), "layers by their demand"


@pytest.mark.parametrize("head_budgets", [False, True])
def test_branches_share_their_prompt_and_grow(head_budgets: bool) -> None:
    model, inputs = build("llama"), prompt()
    changes = {"ratio": 0.7, "min_budget": LEAST, "head_budgets": head_budgets}
    cache = make_cache(BRANCHED, model, profile=[1, 9, 4], **changes)
    recorder = Recorder(model, cache, inputs["attention_mask"])
    logits = recorder.forward(inputs["input_ids"])
    for _ in range(90):
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
    recorder.check(1e-4)
    report = cache.report()
    assert report.evictions > 10 and report.ratio == 0.7
    held = torch.tensor([layer.held for layer in report.layers]).float()
    assert held.shape == (LAYERS, 2, HEADS)
    real = inputs["attention_mask"].sum(-1) + 90
    budget = (0.7 * real).floor()
    assert ((held.mean((0, 2)) - budget).abs() <= BUFFER + 1).all()


def test_the_report_and_the_pool_grow() -> None:
    model = build("llama")
    cache = ReasonAllocCache(model.config, ratio=0.5, min_budget=LEAST, buffer=BUFFER, window=4)
    driver = Driver(model, cache, torch.ones(1, 30))
    logits = driver(torch.full((1, 30), 7))
    first = cache.report().kv_bytes
    driver.greedy(logits, 200)
    report = cache.report()
    assert "(50% wanted)" in str(report)
    assert max(map(len, str(report).splitlines())) <= 80
    assert abs(report.mean_held - 115) <= BUFFER + 1
    assert 2 * first < report.kv_bytes <= first * (115 + BUFFER + 1) / 30
    assert SlidingWindowCompressCache(model.config, ratio=0.25).report().ratio == 0.25
    assert ReasonAllocCache(model.config, budget=64).report().ratio is None


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1, True, float("nan"), "0.5", [0.5]], ids=repr)
def test_ratio_out_of_range_or_of_another_type(value) -> None:
    with pytest.raises(ValueError, match="ratio: expected a number between 0 and 1, got"):
        ReasonAllocCache(build("llama").config, ratio=value)


def test_either_a_budget_or_a_ratio() -> None:
    config = build("llama").config
    with pytest.raises(ValueError, match="either budget or ratio, got none; budget=None keeps"):
        ReasonAllocCache(config)
    for budget in (64, None):
        with pytest.raises(ValueError, match="either budget or ratio, got both"):
            ReasonAllocCache(config, budget=budget, ratio=0.5)
    with pytest.raises(ValueError, match="min_budget: expected an integer >= 9, got 8"):
        ReasonAllocCache(config, ratio=0.5, min_budget=8)
    ReasonAllocCache(config, budget=512, window=200)


def test_shares_among_the_budgets_of_a_run() -> None:
    config = build("llama").config
    spec = parse_spec("rkv:min_budget=24,prompt=evict")
    policy = spec.make(config, 0.25, None, 0).own_layers[0].policy
    assert (policy.ratio, policy.budget) == (0.25, 24)
    policy = spec.make(config, 64, None, 0).own_layers[0].policy
    assert (policy.ratio, policy.budget) == (None, 64)
    assert spec.keeps_prompt is False
    shared = parse_spec("rkv").make_shared(config, 0.25, 0)
    assert shared.own_layers[0].policy.ratio == 0.25
    with pytest.raises(ValueError, match=r"setting 'ratio=0\.5' is not known"):
        parse_spec("rkv:ratio=0.5")
    assert parse_spec("sliding-window:ratio=0.5").settings["ratio"] == 0.5
