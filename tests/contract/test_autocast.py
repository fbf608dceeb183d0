"""float32 weights under autocast, as accelerate and Trainer run them with mixed precision."""

import pytest
import torch
from transformers import DynamicCache

from hf_reasoncache import Protect, SharedBranchCache, branch_generate
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.risk import Probes, Risk, damage
from hf_reasoncache.scorers import H2O, RKV, SCORERS
from tests.support.caches import CLASSES, KINDS, exact_cache, make_cache
from tests.support.driver import Driver
from tests.support.models import build, prompt
from tests.support.pairs import in_turn

TOLERANCE = {torch.bfloat16: 0.15, torch.float16: 0.03}
"""Largest difference of logits whose standard deviation is 1.4: 8 units in the last place of 4."""


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype)


def generate(model, cache, inputs=None, **arguments):
    arguments = dict(max_new_tokens=60, do_sample=False) | arguments
    with autocast():
        return model.generate(**(inputs or prompt()), **cache_kwarg(cache), **arguments)


def logits_of(model, cache, dtype, feed=None):
    """Logits `[steps, B, V]` after the prompt and each of 30 tokens, and these tokens."""
    inputs, fed = prompt(), []
    driver = Driver(model, cache, inputs["attention_mask"])
    with autocast(dtype):
        logits = [driver(inputs["input_ids"])[:, -1]]
        for step in range(30):
            fed.append(logits[-1].argmax(-1, keepdim=True) if feed is None else feed[step])
            logits.append(driver(fed[-1])[:, -1])
    return torch.stack(logits).float(), fed


@pytest.mark.parametrize(
    ("name", "attention", "dtype"),
    in_turn(
        ["llama", "qwen3", "gemma3", "gpt_oss"],
        ["reasoncache", "reasoncache_eager"],
        [*TOLERANCE],
    ),
    ids=str,
)
def test_exact_caches_are_dynamic_cache(name, attention, dtype):
    model = build(name, attention)
    expected, fed = logits_of(model, DynamicCache(config=model.config), dtype)
    for kind in KINDS:
        cache = exact_cache(kind, model)
        found, _ = logits_of(model, cache, dtype, fed)
        assert torch.equal(found[0], expected[0]), "the first forward is the base's own"
        assert float((found - expected).abs().max()) < TOLERANCE[dtype], kind
        if dtype == torch.float16:
            assert torch.equal(found.argmax(-1), expected.argmax(-1)), kind
        ours = [layer for layer in cache.layers if hasattr(layer, "store")]
        held = {tensor.dtype for layer in ours for tensor in layer.kv_tensors()}
        assert held == {dtype}, "what attention reads, and no more bytes"


def test_float64_is_left_alone():
    model = build("llama").double()
    cache = exact_cache("reason_alloc", model)
    with autocast(), torch.no_grad():
        model(**prompt(), **cache_kwarg(cache))
    assert cache.layers[0].dtype == torch.float64


def lowered(name):
    """A scorer that says when autocast could lower its sums."""
    kind = SCORERS[name]

    class Watched(kind):
        calls = 0

        def score(self, held):
            assert not torch.is_autocast_enabled("cpu")
            Watched.calls += 1
            return super().score(held)

    return Watched


def fitting(name, kind):
    """Compressed branches keep no account of attention mass."""
    return kind != "branched" or not SCORERS[name]().needs_cumulative_attention


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in SCORERS for kind in KINDS if fitting(name, kind)]
)
def test_every_scorer_works_and_is_not_lowered(name, kind):
    model, scorer = build("llama"), lowered(name)
    protect = {} if kind == "branched" else {"protect": False}
    cache = make_cache(kind, model, scorer=scorer(), **protect)
    assert generate(model, cache, max_new_tokens=40).shape == (2, 61)
    assert cache.report().evicted > 0 and scorer.calls > 0


@pytest.mark.parametrize("kind", CLASSES)
def test_risk_and_probes_are_not_lowered(kind, monkeypatch):
    calls = []

    class Watched(damage._Attention):
        def __init__(self, *args):
            calls.append(torch.is_autocast_enabled("cpu"))
            super().__init__(*args)

    monkeypatch.setattr(damage, "_Attention", Watched)
    model = build("llama")
    cache = make_cache(
        kind, model, risk=Risk(0.01, probes=Probes(heads=1.0, interval=5)), head_budgets=True
    )
    generate(model, cache)
    report = cache.report()
    assert calls and not any(calls)
    assert float(report.errors.max()) > 0 and float(report.probe_errors.max()) > 0


@pytest.mark.parametrize("kind", ["reason_alloc", "sliding_window"])
@pytest.mark.parametrize("scorer", [RKV(), H2O()], ids=repr)
def test_a_rejected_draft_is_taken_back(kind, scorer):
    """Drafts are cropped, and accepted tokens stored again, outside of any forward."""
    model, inputs = build("llama"), {key: x[:1] for key, x in prompt().items()}
    changes = dict(scorer=scorer, protect=Protect(prompt_length=21))
    cache = make_cache(kind, model, **changes)
    out = generate(model, cache, inputs, prompt_lookup_num_tokens=4)
    assert out.shape == (1, 81) and cache.report().evicted > 0


@pytest.mark.parametrize("suffix", [False, True])
def test_branches_share_their_prompt(suffix):
    model, inputs = build("llama"), prompt()
    cache = make_cache("branched", model) if suffix else SharedBranchCache(model.config)
    with autocast():
        out = branch_generate(
            model, inputs, num_branches=3, past_key_values=cache, max_new_tokens=40, do_sample=True
        )
    assert out.shape == (6, 61) and cache.report().branches.segments == 2
    cache.reset()
    generate(model, cache, inputs, num_beams=3)
    assert cache.report().branches.rows == 6
