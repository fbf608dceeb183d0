"""ExpectedAttention in a cache against the oracle, by its name, and what it refuses."""

from __future__ import annotations

import pytest

from hf_reasoncache.evaluation import parse_spec
from hf_reasoncache.evaluation.specs import control
from hf_reasoncache.geometry import rotary_frequencies
from hf_reasoncache.scorers import ExpectedAttention, Random
from tests.support.models import build, prompt
from tests.support.oracle import Recorder
from tests.support.scorer_inputs import held_tokens


@pytest.mark.parametrize(
    "text",
    ["expected-attention:prompt=evict", "reason-alloc:scorer=expected-attention,prompt=evict"],
)
def test_logits_equal_the_oracle_in_a_cache_made_by_name(text: str) -> None:
    model, inputs = build("llama"), prompt(batch=2, padding=(0, 7))
    cache = parse_spec(text, window=4, buffer=8).make(model.config, 24, None, seed=0)
    scorer = cache.own_layers[0].policy.scorer
    assert scorer == ExpectedAttention(tuple(rotary_frequencies(model.config)))
    recorder = Recorder(model, cache, inputs["attention_mask"])
    logits = recorder.forward(inputs["input_ids"])
    for _ in range(40):
        logits = recorder.forward(logits.argmax(-1, keepdim=True))
    assert cache.report().evictions >= 6
    recorder.check(1e-4)
    held = [head for layer in range(3) for head in cache.held_positions(layer)[1]]
    assert all(set(range(7, 11)) <= set(head) for head in held), "the first tokens are kept"


def test_random_eviction_stands_beside_it() -> None:
    other = control(parse_spec("expected-attention:prompt=evict"))
    assert other.name == "random:prompt=evict"
    made = other.make(build("llama").config, 40, None, 0)
    assert made.own_layers[0].policy.scorer == Random()


def test_what_is_refused_by_name() -> None:
    held = held_tokens([[9]], [9])
    with pytest.raises(ValueError, match=r"queries of 6 numbers, two per frequency, got 16"):
        ExpectedAttention((1.0, 0.1, 0.01)).score(held)
    for name in ("queries", "ahead"):
        with pytest.raises(ValueError, match=f"integer {name} >= 1, got 0"):
            ExpectedAttention((1.0,), **{name: 0})
    with pytest.raises(ValueError, match="integer sinks >= 0, got -1"):
        ExpectedAttention((1.0,), sinks=-1)
    with pytest.raises(ValueError, match=r"deepseek_v3: expected .* multi-head latent attention"):
        parse_spec("expected-attention").make(build("deepseek_v3").config, 40, None, 0)
