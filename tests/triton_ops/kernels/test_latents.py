"""Latents with the kernels: one field that is key and value, in steps, evictions and graphs."""

import pytest
import torch

from hf_reasoncache import (
    ReasonAllocCache,
    SharedBranchCache,
    SlidingWindowCompressCache,
    decode_graphs,
    joint_evictions,
)
from hf_reasoncache.graphs import CudaRecorder
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV, LagKV, VaSE
from tests.support.models import prompt
from tests.support.ops.generation import generate, host_tensors, small_latents
from tests.support.ops.tape import TapeRecorder
from triton_ops.backend import interpreting, use_backend

TIGHT = dict(budget=8, buffer=3, window=2, protect=False)
CASES = {
    "R-KV": (ReasonAllocCache, TIGHT | dict(scorer=RKV(queries=2), profile=[1.0, 2.0])),
    "H2O": (ReasonAllocCache, TIGHT | dict(scorer=H2O(attention_decay=0.9))),
    # They look at values.
    "LagKV": (ReasonAllocCache, TIGHT | dict(scorer=LagKV(), budget=12)),
    "VaSE": (ReasonAllocCache, TIGHT | dict(scorer=VaSE())),
    "8 bits": (ReasonAllocCache, TIGHT | dict(scorer=VaSE(), storage="fp8")),
    "windows": (SlidingWindowCompressCache, dict(window=4, ratio=0.5, recent=2)),
    "branches": (SharedBranchCache, {}),
    "branches in 8 bits": (SharedBranchCache, dict(storage="fp8")),
    "evicting branches": (
        SharedBranchCache,
        dict(suffix=ReasonAllocCache.policy(budget=12, buffer=2, window=2)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_those_of_pytorch(name, device):
    kind, settings = CASES[name]
    model = small_latents().to(device)
    inputs = prompt(tokens=9, padding=(0, 3))
    if kind is SharedBranchCache:
        inputs = {key: x[:1].repeat(2, 1) for key, x in inputs.items()}
    inputs = {key: x.to(device) for key, x in inputs.items()}
    found = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            cache = kind(model.config, **settings)
            tokens = generate(model, cache, inputs)
            held = [cache.held_positions(layer.index) for layer in cache.own_layers]
            found.append((tokens.cpu(), held))
            report = cache.report()
            assert (report.evictions > 0) == (not name.startswith("branches"))
            assert report.backend.startswith(backend)
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_all_layers_evict_at_once(device, monkeypatch):
    model = small_latents().to(device)
    inputs = {key: x.to(device) for key, x in prompt(tokens=9, padding=(0, 3)).items()}
    layers, run = [], joint_evictions.JointEvictions._evict

    def noted(self, number, some, rows):
        layers.append([layer.index for layer in some])
        run(self, number, some, rows)

    monkeypatch.setattr(joint_evictions.JointEvictions, "_evict", noted)
    together = ReasonAllocCache(model.config, **TIGHT)
    tokens = generate(model, together, inputs)
    assert layers and set(map(tuple, layers)) == {(0, 1)}
    monkeypatch.setattr(joint_evictions.JointEvictions, "run", lambda self: None)
    alone = ReasonAllocCache(model.config, **TIGHT)
    assert torch.equal(generate(model, alone, inputs), tokens)
    for layer in range(2):
        assert together.held_positions(layer) == alone.held_positions(layer)


@pytest.mark.parametrize(
    "settings", [dict(budget=None), TIGHT, TIGHT | dict(storage="fp8")], ids=str
)
def test_graphs_give_the_tokens_without_them(settings, device):
    model = small_latents().to(device)
    inputs = {key: x.to(device) for key, x in prompt(tokens=9, padding=(0, 3)).items()}
    plain, cache = (ReasonAllocCache(model.config, **settings) for _ in range(2))
    arguments = inputs | {"max_new_tokens": 9, "do_sample": False}
    expected = model.generate(**arguments, **cache_kwarg(plain))
    recorder = TapeRecorder(lambda: host_tensors(cache)) if interpreting() else CudaRecorder()
    with decode_graphs(model, cache, recorder=recorder) as graphs:
        assert torch.equal(model.generate(**arguments, **cache_kwarg(cache)), expected)
    assert graphs.replayed >= 4
    for layer in range(2):
        assert cache.held_positions(layer) == plain.held_positions(layer)
