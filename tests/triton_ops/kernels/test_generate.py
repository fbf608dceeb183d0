"""Whole generations with the kernels: the same tokens as with PyTorch, evictions included."""

import pytest
import torch

from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache
from hf_reasoncache.scorers import H2O, RKV
from tests.support.models import build, prompt
from tests.support.ops.generation import generate, small_llama
from triton_ops.backend import interpreting, use_backend


def both(model, device, inputs, arguments, kind=ReasonAllocCache, **settings):
    """Tokens and held positions with the kernels and with PyTorch, and the reports."""
    model = model.to(device)
    inputs = {key: value.to(device) for key, value in inputs.items()}
    results = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            cache = kind(model.config, **settings)
            tokens = generate(model, cache, inputs, **arguments)
            report = cache.report()
            held = [cache.held_positions(layer.index) for layer in report.layers]
            results.append((tokens, report, held))
    return results


def check(results):
    (tokens, report, held), (expected, wanted, held_by_torch) = results
    assert report.backend == ("triton (interpreter)" if interpreting() else "triton")
    assert wanted.backend == "torch"
    assert torch.equal(tokens, expected)
    assert held == held_by_torch
    assert report.evicted == wanted.evicted


@pytest.mark.parametrize("scorer", [RKV(), H2O(attention_decay=0.9)], ids=repr)
def test_tokens_of_a_padded_batch_with_evictions(scorer, device):
    results = both(
        small_llama(),
        device,
        prompt(tokens=11, padding=(0, 3)),
        {},
        budget=8,
        buffer=3,
        window=2,
        profile=[1.0, 3.0],
        scorer=scorer,
        protect=False,
    )
    check(results)
    assert results[0][1].evictions >= 8


@pytest.mark.parametrize("changes", [{}, {"max_budget": 11, "head_budgets": True}], ids=str)
def test_tokens_of_windows(changes, device):
    results = both(
        small_llama(query_heads=2),
        device,
        prompt(tokens=7, padding=(0, 3)),
        {"max_new_tokens": 14},
        SlidingWindowCompressCache,
        window=4,
        ratio=0.5,
        recent=2,
        **changes,
    )
    check(results)
    assert results[0][1].evictions >= 8


def test_tokens_with_sinks_in_a_hybrid_model(device):
    model, inputs = build("gpt_oss"), prompt(batch=1, tokens=9)
    results = both(model, device, inputs, {}, budget=13, buffer=2, window=4)
    check(results)
    assert results[0][1].evictions > 0


def test_tokens_of_drafts_without_a_budget(device):
    model, inputs = small_llama(), prompt(batch=1, tokens=9)
    check(both(model, device, inputs, {"prompt_lookup_num_tokens": 4}, budget=None))
