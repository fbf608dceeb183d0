"""Traces: batches equal rows alone, ends are cut, random numbers belong to the batch."""

from __future__ import annotations

import pytest
import torch

from hf_reasoncache.calibration.traces import TraceSettings, generate_traces
from tests.support.models import build, prompt

GREEDY = TraceSettings(max_new_tokens=12, temperature=0.0)
SAMPLED = TraceSettings(max_new_tokens=12, temperature=1.0, seed=5)


def prompts() -> list[list[int]]:
    inputs = prompt(batch=3, padding=(0, 7, 13))
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


@pytest.mark.parametrize("name", ["llama", "qwen2_sliding"])
def test_a_padded_batch_writes_what_each_prompt_writes_alone(name: str) -> None:
    model = build(name)
    together = generate_traces(model, prompts(), GREEDY)
    alone = [generate_traces(model, [each], GREEDY)[0] for each in prompts()]
    assert together == alone
    model.set_attn_implementation("sdpa")
    plain = model.generate(torch.tensor([prompts()[1]]), max_new_tokens=12, do_sample=False)
    assert together[1].prompt + together[1].completion == tuple(plain[0].tolist())


def test_a_completion_ends_with_the_first_end() -> None:
    model = build("llama")
    whole = generate_traces(model, prompts(), GREEDY)
    end = whole[0].completion[3]
    model.generation_config.eos_token_id = [end, 96]
    for before, after in zip(whole, generate_traces(model, prompts(), GREEDY), strict=True):
        stop = before.completion.index(end) + 1 if end in before.completion else 12
        assert after.completion == before.completion[:stop]
    assert model.generation_config.max_new_tokens is None


def test_random_numbers_depend_on_seed_and_batch_alone() -> None:
    model = build("llama")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate_traces(model, prompts(), SAMPLED, stream=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert generate_traces(model, prompts(), SAMPLED, stream=2) == first
    assert generate_traces(model, prompts(), SAMPLED, stream=3) != first
    assert generate_traces(model, prompts(), GREEDY) != first


def test_the_models_own_way_to_sample_is_the_default() -> None:
    model = build("llama")
    model.generation_config.do_sample = True
    model.generation_config.top_k = 1
    model.generation_config.num_return_sequences = 3
    model.generation_config.return_dict_in_generate = True
    own = generate_traces(model, prompts(), TraceSettings(max_new_tokens=12))
    assert own == generate_traces(build("llama"), prompts(), GREEDY)


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 1}, {"batch_size": 0}, {"seed": -1}, {"temperature": -0.5}]
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        TraceSettings(**wrong)
