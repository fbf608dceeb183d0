"""Which heads of a layer a process finds that it holds, without starting any other process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.shards import ALONE, _device_of, find_shard, in_several_processes
from tests.support.models import build, prompt


@pytest.fixture
def world():
    """One process that believes to be number 3 of 4; messages go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield
    dist.destroy_process_group()


def attention(*shards, weight=None):
    """A module whose weights lie on device meshes."""
    module = torch.nn.Linear(4, 4, bias=False)
    for number, (mesh, placements) in enumerate(shards):
        tensor = DTensor.from_local(torch.zeros(4, 4), mesh, placements, run_check=False)
        module.register_parameter(f"w{number}", torch.nn.Parameter(tensor))
    return module


def test_alone_there_is_nothing_to_find():
    assert not in_several_processes()
    tensor = torch.arange(6).view(1, 6)
    assert ALONE.gather(tensor) is tensor and ALONE.own(tensor, 6) is tensor


def test_all_heads_are_here(world):
    """Data parallelism: other processes have other prompts."""
    assert in_several_processes()
    assert find_shard(attention(), 8, 8, "agree") is ALONE


@pytest.mark.parametrize("tp_mode", ["agree", "local"])
def test_weights_that_do_not_say_are_sharded_over_all(world, tp_mode):
    shard = find_shard(attention(), 2, 8, tp_mode)
    assert (shard.first, shard.total, shard.agrees) == (6, 8, tp_mode == "agree")
    assert copy.deepcopy(shard) is shard


def test_the_mesh_of_the_weights_says_which_processes_have_the_others(world):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    replicated = attention((mesh["tp"], [Shard(0)]), (mesh["dp"], [Replicate()]))
    shard = find_shard(replicated, 4, 8, "agree")
    assert (shard.first, shard.total) == (4, 8)
    assert dist.get_process_group_ranks(shard.group) == [2, 3]
    whole = attention((mesh, [Shard(0), Shard(0)]))
    assert dist.get_process_group_ranks(find_shard(whole, 4, 8, "agree").group) == [2, 3]


def test_what_cannot_be_understood_is_refused(world):
    with pytest.raises(ValueError, match=r"8 KV heads.* so 4 of them in each of 2.*group of 4"):
        find_shard(attention(), 4, 8, "agree")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    with pytest.raises(ValueError, match=r"dimension called 'tp', got .*'a', 'b'"):
        find_shard(attention((mesh, [Shard(0), Shard(0)])), 2, 8, "agree")
    apart = attention((mesh["a"], [Shard(0)]), (mesh["b"], [Shard(0)]))
    with pytest.raises(ValueError, match=r"on one device mesh, got 2"):
        find_shard(apart, 4, 8, "agree")


def test_heads_that_share_latents_are_refused_apart(world):
    """Each process would evict by its own heads, and hold other latents than the others."""
    model = build("deepseek_v3")
    cache = ReasonAllocCache(model.config, budget=None)
    # As if this process had six of twelve heads.
    model.config.num_attention_heads = 12
    with pytest.raises(ValueError, match=r"all heads of a layer with latents .* got 6 of 12"):
        model(prompt()["input_ids"], **cache_kwarg(cache))


def test_an_unknown_agreement_is_refused():
    config = build("llama").config
    with pytest.raises(ValueError, match=r"tensor_parallel: expected one of .*got 'never'"):
        ReasonAllocCache(config, budget=40, tensor_parallel="never")


def test_a_copy_of_a_cache_stays_in_its_group(world):
    cache = ReasonAllocCache(build("llama").config, budget=40)
    cache.layers[0].shard = find_shard(attention(), 2, 8, "agree")
    assert copy.deepcopy(cache).layers[0].shard is cache.layers[0].shard


@pytest.mark.parametrize(
    ("backends", "lies", "sent"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),
        ("cpu:gloo,cuda:gloo", "cuda:1", "cpu"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cpu", "cuda:2"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"),
    ],
)
def test_a_message_starts_where_the_backend_can_send_it(backends, lies, sent, monkeypatch):
    """Counts are on the CPU, scores where the layer runs."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 2)
    assert _device_of(None, torch.device(lies)) == torch.device(sent)


def test_the_backends_of_a_group_are_known(world):
    """That of the test has one for every kind of device."""
    assert _device_of(dist.group.WORLD, torch.device("cpu")) == torch.device("cpu")
