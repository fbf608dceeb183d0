"""With eviction on: logits against the oracle, rows against themselves alone, assisted against
plain."""

import pytest
import torch

from hf_reasoncache import Protect
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV, Random, SnapKV, StreamingLLM
from tests.support.caches import BRANCHED, KINDS, make_cache
from tests.support.models import VOCABULARY, build, prompt
from tests.support.oracle import Recorder

UNEQUAL = {
    "llama": [1.0, 9.0, 4.0],
    "qwen3": [5.0, 1.0, 2.0],
    "qwen2_sliding": [1, 6],
    "gemma3": [4, 1],
    "gpt_oss": [1, 4],
}

THRESHOLD = [
    ("reason_alloc", {"scorer": s}) for s in (RKV(), SnapKV(), H2O(), StreamingLLM(), Random())
]
SHARE = ("reason_alloc", {"ratio": 0.6, "min_budget": 10})
WINDOWS = [
    ("sliding_window", {"head_budgets": True} | changes)
    for changes in ({}, {"max_budget": 42, "scorer": RKV()}, {"scorer": H2O(), "chunk_share": 0.0})
]


def decode(recorder, logits, steps):
    for _ in range(steps):
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
    return logits


@pytest.mark.parametrize(("kind", "changes"), [*THRESHOLD, SHARE, *WINDOWS], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logits_equal_oracle_over_compactions_and_turns(name, kind, changes):
    model, inputs = build(name), prompt()
    cache = make_cache(kind, model, profile=UNEQUAL[name], **changes)
    recorder = Recorder(model, cache, inputs["attention_mask"])
    logits = decode(recorder, recorder.forward(inputs["input_ids"]), 60)
    assert cache.report().evictions >= 12, "several compactions are part of this test"
    held = {len(head) for i in range(3) for row in cache.held_positions(i) for head in row}
    assert len(held) > 2, "unequal layer and head budgets are part of this test"
    second = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(5))
    logits = recorder.forward(torch.cat([logits.argmax(-1, keepdim=True), second], dim=1))
    decode(recorder, logits, 20)
    recorder.check(1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen2_sliding", "gemma3", "gpt_oss"])
def test_logits_equal_oracle_in_hybrid_models(name, kind):
    model, inputs = build(name), prompt()
    cache = make_cache(kind, model, profile=UNEQUAL[name])
    recorder = Recorder(model, cache, inputs["attention_mask"])
    decode(recorder, recorder.forward(inputs["input_ids"]), 60)
    assert cache.report().evictions > 0
    recorder.check(1e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("reason_alloc", {"budget": 24, "scorer": RKV()}),
        ("reason_alloc", {"budget": 24, "scorer": H2O()}),
        ("reason_alloc", {"ratio": 0.25, "min_budget": 10, "scorer": H2O()}),
        ("sliding_window", {}),
        ("sliding_window", {"max_budget": 36, "prompt_ratio": 0.25, "scorer": H2O()}),
    ],
    ids=str,
)
def test_logits_equal_oracle_when_the_prompt_is_cut(kind, changes):
    model, inputs = build("llama"), prompt(tokens=90, padding=(0, 33))
    cache = make_cache(kind, model, protect=False, **changes)
    recorder = Recorder(model, cache, inputs["attention_mask"])
    logits = recorder.forward(inputs["input_ids"])
    assert (
        max(count for layer in cache.report().layers for row in layer.held for count in row) <= 48
    )
    assert cache.held_positions(0)[0][0] == list(range(90)), "what the last forward attended to"
    logits = decode(recorder, logits, 30)
    long = torch.randint(3, VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(5))
    logits = recorder.forward(long)
    decode(recorder, logits, 12)
    recorder.check(1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_oracle_in_chunked_prompts(kind):
    model, inputs = build("llama"), prompt(tokens=30, padding=(0, 11))
    for protect in (True, False):
        if kind == BRANCHED and not protect:
            continue  # refused: see test_branches
        cache = make_cache(kind, model, profile=[1, 9, 4], protect=protect)
        recorder = Recorder(model, cache, inputs["attention_mask"])
        for chunk in inputs["input_ids"].split(12, dim=1):
            logits = recorder.forward(chunk)
        decode(recorder, logits, 40)
        assert cache.report().evictions > 0
        recorder.check(1e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *(
            ("reason_alloc", {"budget": 32, "scorer": s})
            for s in (RKV(), SnapKV(), H2O(), Random())
        ),
        SHARE,
        ("reason_alloc", {"ratio": 0.4, "min_budget": 6, "head_budgets": False, "protect": False}),
        ("sliding_window", {"head_budgets": True}),
        ("sliding_window", {"max_budget": 40, "scorer": RKV()}),
        ("sliding_window", {"protect": False, "scorer": H2O()}),
    ],
    ids=str,
)
def test_row_in_padded_batch_equals_row_alone(kind, changes):
    model, inputs = build("llama"), prompt(batch=3, padding=(0, 7, 16))

    def run(ids, mask):
        cache = make_cache(kind, model, profile=[1.0, 9.0, 4.0], **changes)
        out = model.generate(
            input_ids=ids, attention_mask=mask, **cache_kwarg(cache), max_new_tokens=48
        )
        return out[:, ids.shape[1] :], [cache.held_positions(i) for i in range(3)]

    tokens, held = run(**{"ids": inputs["input_ids"], "mask": inputs["attention_mask"]})
    for row, pad in enumerate((0, 7, 16)):
        alone, held_alone = run(
            inputs["input_ids"][row : row + 1, pad:], inputs["attention_mask"][row : row + 1, pad:]
        )
        assert torch.equal(alone[0], tokens[row])
        for layer in range(3):
            shifted = [[position + pad for position in head] for head in held_alone[layer][0]]
            assert shifted == held[layer][row]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *(
            ("reason_alloc", {"budget": 32, "buffer": 5, "scorer": s})
            for s in (RKV(), H2O(attention_decay=0.9), Random())
        ),
        ("reason_alloc", {"ratio": 0.5, "min_budget": 10, "buffer": 5}),
        ("sliding_window", {"head_budgets": True}),
        ("sliding_window", {"max_budget": 36, "scorer": H2O()}),
    ],
    ids=str,
)
def test_assisted_equals_plain(kind, changes):
    model = build("llama")
    inputs = {key: value[:1] for key, value in prompt().items()}
    length = inputs["input_ids"].shape[1]
    similar = build("llama")
    with torch.no_grad():
        similar.lm_head.weight.add_(torch.randn_like(similar.lm_head.weight) * 0.02)
    drafts = {
        "assistant": {"assistant_model": similar},
        "same_model": {"assistant_model": build("llama")},
        "prompt_lookup": {"prompt_lookup_num_tokens": 6},
    }

    def run(**more):
        cache = make_cache(
            kind, model, profile=[1, 9, 4], protect=Protect(prompt_length=length), **changes
        )
        out = model.generate(**inputs, **more, **cache_kwarg(cache), max_new_tokens=70)
        return out, cache.report().evictions

    plain, evictions = run()
    assert evictions > 20
    for way, arguments in drafts.items():
        assert torch.equal(plain, run(**arguments)[0]), way
