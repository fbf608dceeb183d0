"""What once went wrong: each of these was a bug that a user could have met."""

import copy
import dataclasses

import pytest
import torch
from transformers import DynamicCache

from hf_reasoncache import Protect, ReasonAllocCache
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV, Random, SnapKV
from tests.support.driver import new_cache, start, tokens
from tests.support.models import VOCABULARY, build, prompt, sliding_first
from tests.support.reachable import tensors_reachable_from
from triton_ops.redundancy import search

HUGE = 10**30


def test_flash_attention_is_told_its_own_name(fake_flash):
    """It loads the kernel by `config._attn_implementation`, and does not know ours."""
    model = build("llama", "reasoncache_fa2")
    tokens(model, ReasonAllocCache(model.config, budget=None), max_new_tokens=2)
    assert set(fake_flash) == {"flash_attention_2"}
    assert model.config._attn_implementation == "reasoncache_fa2"


def test_prompt_length_beyond_the_prompt_still_protects_the_prompt():
    model = build("llama")
    cache = new_cache(model, protect=Protect(prompt_length=1000))
    tokens(model, cache)
    assert cache.report().evictions > 0
    for layer in range(3):
        for head in cache.held_positions(layer)[0]:
            assert head[:21] == list(range(21))


@pytest.mark.parametrize("padding", [(0, 6), (0, 13)])
def test_single_token_chunks_honour_padding(padding):
    model, inputs = build("llama"), prompt(padding=padding)
    expected = tokens(model, DynamicCache(config=model.config), inputs, prefill_chunk_size=1)
    cache = ReasonAllocCache(model.config, budget=None)
    assert torch.equal(tokens(model, cache, inputs, prefill_chunk_size=1), expected)
    assert cache.held_positions(0)[1][0][0] == padding[1]


@pytest.mark.parametrize("scorer", [RKV(), Random(), SnapKV()], ids=repr)
def test_chunk_of_padding_only_does_not_move_the_first_token(scorer):
    """Row 1's first chunk is all padding; the row still evicts as it does alone."""
    model, inputs = build("llama"), prompt(tokens=30, padding=(0, 13))
    changes = dict(scorer=scorer, budget=48)
    cache = new_cache(model, **changes)
    out = tokens(model, cache, inputs, prefill_chunk_size=10)
    single = {key: value[1:, 13:] for key, value in inputs.items()}
    alone = new_cache(model, **changes)
    assert torch.equal(tokens(model, alone, single)[0], out[1, 13:])
    for layer in range(3):
        held = [[at + 13 for at in head] for head in alone.held_positions(layer)[0]]
        assert cache.held_positions(layer)[1] == held


@pytest.mark.parametrize("budget", [None, 40])
def test_forward_with_gradients_enabled_keeps_no_graph(budget):
    model, inputs = build("llama"), prompt()
    cache = new_cache(model, budget=budget)
    with torch.enable_grad():
        logits = model(**inputs, **cache_kwarg(cache)).logits
        for _ in range(30):
            logits = model(logits[:, -1:].argmax(-1), **cache_kwarg(cache)).logits
    for layer in cache.layers:
        assert not any(field.requires_grad for field in layer.store.pool.fields.values())
    copy.deepcopy(cache)


@pytest.mark.parametrize("budget", [None, 40])
def test_cache_filled_in_inference_mode_serves_outside_of_it(budget):
    model, inputs = build("llama"), prompt()
    cache = new_cache(model, budget=budget)
    with torch.inference_mode():
        model(**inputs, **cache_kwarg(cache))
    with torch.no_grad():
        model(torch.ones(2, 1, dtype=torch.long), **cache_kwarg(cache))


@pytest.mark.parametrize("scorer", [RKV, Random, H2O])
def test_scorer_class(scorer):
    with pytest.raises(ValueError, match=r"scorer: expected an object"):
        ReasonAllocCache(build("llama").config, budget=64, scorer=scorer)


@pytest.mark.parametrize(
    "profile", [5, [1, None, 2], [[1], [2], [3]], "abc", "123", {0: 1}, [1, "2", 3]], ids=repr
)
def test_profile_that_is_no_sequence_of_numbers(profile):
    with pytest.raises(ValueError, match=r"profile: expected"):
        ReasonAllocCache(build("llama").config, budget=64, profile=profile)


@pytest.mark.parametrize("name", ["budget", "buffer"])
def test_absurdly_large_number(name):
    settings = {"budget": 64} | {name: HUGE}
    model = build("llama")
    with pytest.raises(ValueError, match=f"{name}: expected"):
        tokens(model, ReasonAllocCache(model.config, **settings))


@pytest.mark.parametrize("name", ["head_budgets", "protect"])
@pytest.mark.parametrize("value", ["no", None, 2])
def test_flag_that_is_no_bool(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        ReasonAllocCache(build("llama").config, budget=64, **{name: value})


@pytest.mark.parametrize("budget", [None, 40])
def test_generation_interrupted_between_two_layers(budget):
    model = build("llama")
    cache = new_cache(model, budget=budget)
    tokens(model, cache, max_new_tokens=3)

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    token = torch.ones(2, 1, dtype=torch.long)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(token, **cache_kwarg(cache))
    hook.remove()
    with pytest.raises(ValueError, match=r"reset\(\)"), torch.no_grad():
        model(token, **cache_kwarg(cache))


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_other_batch_where_the_first_layer_slides(name):
    model = sliding_first(name)
    cache = new_cache(model, profile=None)
    tokens(model, cache, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"a batch of 2 rows.*got 3; reset\(\)"):
        tokens(model, cache, prompt(batch=3, tokens=40, padding=(0, 0, 0)))


@pytest.mark.parametrize("budget", [None, 40])
def test_assisted_decoding_reports_all_it_holds(budget):
    model, inputs = build("llama"), prompt(batch=1)
    profile = None if budget is None else [1, 9, 4]
    cache = new_cache(model, budget=budget, protect=Protect(prompt_length=21), profile=profile)
    worst = 0

    def watch(module, arguments, output):
        nonlocal worst
        found = {}
        for layer in cache.layers:
            tensors_reachable_from(vars(layer), found, set())
        held = sum(size for size in found.values() if size > 64)
        worst = max(worst, held / max(cache.report().total_bytes, 1))

    hook = model.register_forward_hook(watch)
    tokens(model, cache, inputs, prompt_lookup_num_tokens=4, max_new_tokens=100)
    hook.remove()
    assert worst < 1.05


def test_assisted_decoding_allocates_the_budget_once():
    model, inputs = build("llama"), prompt(batch=1)
    cache = new_cache(model, budget=100, protect=Protect(prompt_length=21))
    sizes = []

    def watch(module, arguments, output):
        sizes.append(cache.layers[0].store.pool.layout.slots)

    hook = model.register_forward_hook(watch)
    tokens(model, cache, inputs, prompt_lookup_num_tokens=4, max_new_tokens=60)
    hook.remove()
    assert len(set(sizes)) <= 3


def test_a_crop_over_an_eviction_forgets_which_key_repeats_which(monkeypatch):
    """Other tokens took the positions that R-KV's scorer_state were about."""
    differences = []

    class Checked(RKV):
        def score(self, held):
            scores = super().score(held)
            differences.append(scores - super().score(dataclasses.replace(held, scorer_state=None)))
            return scores

    # Nothing is known about what lies in the first block.
    monkeypatch.setattr(search, "BLOCK", 4)
    driver, logits = start(build("llama"), scorer=Checked(threshold=0.7))
    driver.greedy(logits, 43)
    driver.cache.crop(-20)
    driver.seen -= 20
    differences.clear()
    others = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    for token in others.split(1, dim=1):
        driver(token)
    assert differences
    assert max(float(difference.abs().max()) for difference in differences) < 1e-6
