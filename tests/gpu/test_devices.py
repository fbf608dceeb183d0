"""One model over two GPUs: each pool lies where its layer runs, and a step moves what it must."""

from collections import Counter

import pytest
import torch
from accelerate import dispatch_model
from transformers import DynamicCache

from examples.benchmarks.moves import Moves
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.releases import cache_kwarg
from tests.support.caches import KINDS, exact_cache, make_cache
from tests.support.models import build, prompt

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

PLACES = {"model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1}
REST = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}


@pytest.fixture(scope="module")
def spread():
    return dispatch_model(build("llama"), device_map=PLACES | REST)


@pytest.fixture(scope="module")
def here():
    return build("llama").cuda()


def generate(model, cache, tokens=60):
    inputs = {name: tensor.cuda() for name, tensor in prompt().items()}
    return model.generate(
        **inputs, **cache_kwarg(cache), do_sample=False, max_new_tokens=tokens
    ).cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_two_devices_give_what_one_gives(kind, spread, here):
    full = generate(here, DynamicCache(config=here.config))
    assert torch.equal(generate(spread, exact_cache(kind, spread)), full)
    expected, cache = make_cache(kind, here), make_cache(kind, spread)
    assert torch.equal(generate(spread, cache), generate(here, expected))
    assert cache.report().evicted == expected.report().evicted > 0
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, CacheLayer)
        assert {x.device.index for x in layer.tensors()} == {PLACES[f"model.layers.{index}"]}


def crossings(moves):
    """What has gone from one GPU to the other."""
    pairs = moves.tensors.items()
    return Counter({key: n for key, n in pairs if key[0] != key[1] and "cpu" not in key})


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_crosses_as_often_as_without_us(kind, spread):
    """Padding is not moved: the new tokens are real."""
    found = []
    for cache in (make_cache(kind, spread), DynamicCache(config=spread.config)):
        generate(spread, cache, tokens=3)
        ids = torch.full((2, 1), 5, device="cuda:0")
        mask = torch.ones(2, cache.get_seq_length() + 1, dtype=torch.long, device="cuda:0")
        mask[1, :7] = 0
        with Moves() as moves, torch.no_grad():
            spread(input_ids=ids, attention_mask=mask, **cache_kwarg(cache), use_cache=True)
        found.append(crossings(moves))
    ours, theirs = found
    assert sum(ours.values()) > 0
    assert not ours - theirs
