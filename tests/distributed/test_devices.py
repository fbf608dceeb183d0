"""A model whose layers are not all in one place: offloaded weights, and what moves between places.

With two GPUs see tests/gpu/test_devices.py.
"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM, DynamicCache

from examples.benchmarks.moves import Moves
from hf_reasoncache.attention import LogicalMask
from hf_reasoncache.releases import cache_kwarg
from tests.support.caches import KINDS, exact_cache, make_cache
from tests.support.models import LAYERS, build, prompt


def offload_to_cpu(model, folder):
    """Weights come to where their layer runs for each forward, and go again."""
    return cpu_offload(model, execution_device=torch.device("cpu"))


def offload_to_disk(model, folder):
    """The same from files."""
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def device_map(model, folder):
    """As from_pretrained does it: some layers in memory, some on the disk."""
    model.save_pretrained(folder / "model")
    places = {f"model.layers.{index}": "disk" if index else "cpu" for index in range(LAYERS)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / "model",
        device_map=places | rest,
        offload_folder=folder / "weights",
        attn_implementation="reasoncache",
    )
    loaded.generation_config.eos_token_id = None
    return loaded


TIGHT = {kind: {"budget": 30} for kind in KINDS if kind != "sliding_window"}
WAYS = [offload_to_cpu, offload_to_disk, device_map]


def generate(model, cache, **arguments):
    settings = dict(do_sample=False, max_new_tokens=24) | arguments
    return model.generate(**prompt(), **cache_kwarg(cache), **settings)


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: way.__name__)
def moved(request, tmp_path_factory):
    return request.param(build("llama"), tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def here():
    return build("llama")


@pytest.fixture(scope="module")
def full(here):
    return generate(here, DynamicCache(config=here.config))


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_weights_change_nothing(kind, moved, here, full):
    assert torch.equal(generate(moved, DynamicCache(config=moved.config)), full)
    assert torch.equal(generate(moved, exact_cache(kind, moved)), full)
    expected, cache = (make_cache(kind, x, **TIGHT.get(kind, {})) for x in (here, moved))
    assert torch.equal(generate(moved, cache), generate(here, expected))
    assert cache.report().evicted == expected.report().evicted > 0
    for index in range(LAYERS):
        assert cache.held_positions(index) == expected.held_positions(index)


def steps(model, cache, given, count):
    """Yield after the prompt and after each of `count` tokens, which are always the same one."""
    mask = torch.cat([given["attention_mask"], given["attention_mask"][:, -1:].repeat(1, count)], 1)
    places, ids = (mask.cumsum(-1) - 1).clamp_min(0), given["input_ids"]
    for seen in range(ids.shape[1], mask.shape[1] + 1):
        tokens = ids if seen == ids.shape[1] else ids[:, -1:]
        with torch.no_grad():
            out = model(
                input_ids=tokens,
                attention_mask=mask[:, :seen],
                position_ids=places[:, seen - tokens.shape[1] : seen],
                **cache_kwarg(cache),
                use_cache=True,
            )
        yield out.logits[:, -1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_what_the_model_moves(kind, moved):
    counted = []
    for cache in (exact_cache(kind, moved), DynamicCache(config=moved.config)):
        running = steps(moved, cache, prompt(), 3)
        next(running)
        next(running)
        with Moves() as moves:
            next(running)
        counted.append(moves.tensors)
    assert counted[0] == counted[1]
    assert sum(counted[0].values()) > 10  # weights


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_lies_where_nobody_put_it(kind, here):
    """Tensors of tokens lie with the model, counts on the CPU, neither on the default device."""
    given, expected = prompt(), make_cache(kind, here)
    logits = list(steps(here, expected, given, 30))
    cache = make_cache(kind, here)
    with torch.device("meta"):
        for step, found in zip(logits, steps(here, cache, given, 30), strict=True):
            assert torch.equal(step, found)
        rates = cache.keep_rates([(0, 4)])
        cache.batch_select_indices(torch.tensor([1, 0], device="cpu"))
        cache.crop(-2)
        print(cache.report())
    assert cache.report().evicted == expected.report().evicted > 0
    assert torch.equal(rates, expected.keep_rates([(0, 4)]))


def test_a_mask_is_moved_when_it_is_needed_and_once():
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]])
    arguments = {"attention_mask": padding, "q_length": 3, "kv_length": 3}
    mask = LogicalMask("sdpa", arguments, None, new=padding.bool())
    with Moves() as moves:
        there = [mask.to("meta", non_blocking=True) for _ in range(3)]
        assert not moves.tensors
        assert {each.valid.device.type for each in there} == {"meta"}
        assert moves.tensors == {("cpu", "meta", (2, 3)): 1}
    assert there[0].valid is there[2].to("meta").valid
    assert mask.valid.device.type == there[0].to("cpu").valid.device.type == "cpu"


def test_a_mask_without_padding_moves_nothing():
    """The padding of 10000 tokens, say, of which a step needs one."""
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]])
    arguments = {"attention_mask": padding, "q_length": 1, "kv_length": 3}
    mask = LogicalMask("sdpa", arguments, None)
    with Moves() as moves:
        assert mask.to("meta").valid is None
    assert not moves.tensors
