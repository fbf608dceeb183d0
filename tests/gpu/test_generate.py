"""End to end on the GPU: the same tokens with both backends and with graphs, and a soak."""

import pytest
import torch

from hf_reasoncache import ReasonAllocCache, decode_graphs
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV
from tests.support.models import build, prompt
from triton_ops.backend import use_backend

SETTINGS = dict(budget=40, buffer=8, window=4)


def generate(model, cache, **arguments):
    inputs = {key: value.cuda() for key, value in prompt().items()}
    settings = dict(do_sample=False, max_new_tokens=200) | arguments
    return model.generate(**inputs, **settings, **cache_kwarg(cache))


@pytest.fixture(scope="module")
def model():
    return build("llama").cuda()


@pytest.mark.parametrize("scorer", [RKV(), H2O(attention_decay=0.9)], ids=repr)
@pytest.mark.parametrize("head_budgets", [True, False])
def test_backends_and_graphs_agree(model, scorer, head_budgets):
    settings = SETTINGS | {"scorer": scorer, "head_budgets": head_budgets}
    with use_backend("torch"):
        expected = generate(model, ReasonAllocCache(model.config, **settings))
    cache = ReasonAllocCache(model.config, **settings)
    assert torch.equal(generate(model, cache), expected)
    assert cache.report().backend == "triton" and cache.report().evictions > 0
    cache = ReasonAllocCache(model.config, **settings)
    with decode_graphs(model, cache) as graphs:
        assert torch.equal(generate(model, cache), expected)
    assert (graphs.recorded, graphs.eager) == (1, 1) and graphs.replayed > 150


def test_a_step_waits_for_nothing(model):
    """PyTorch itself reports synchronisations; the launches of a step after an eviction have
    none."""
    cache = ReasonAllocCache(model.config, **SETTINGS)
    ids = prompt()["input_ids"].cuda()
    with torch.no_grad():
        model(input_ids=ids, **cache_kwarg(cache), use_cache=True)
        token, place = ids[:, -1:], torch.full((2, 1), 21, device="cuda")
        for _ in range(3):
            model(input_ids=token, position_ids=place, **cache_kwarg(cache), use_cache=True)
        for layer in cache.layers:
            layer.prepare()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(input_ids=token, position_ids=place, **cache_kwarg(cache), use_cache=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_is_bounded_over_20000_steps():
    model = build("llama").cuda()
    model.config.max_position_embeddings = 32768
    cache = ReasonAllocCache(model.config, **SETTINGS)
    ids = prompt(batch=1, padding=())["input_ids"].cuda()
    with torch.no_grad(), decode_graphs(model, cache) as graphs:
        token = model(input_ids=ids, **cache_kwarg(cache), use_cache=True).logits[:, -1:].argmax(-1)
        used = []
        for step in range(20_000):
            out = model(input_ids=token, **cache_kwarg(cache), use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            if step % 1000 == 999:
                torch.cuda.synchronize()
                used.append(torch.cuda.memory_allocated())
    assert cache.get_seq_length() == 21 + 20_000
    assert max(used[1:]) <= 1.05 * used[0]
    assert (graphs.recorded, graphs.eager) == (1, 1)
