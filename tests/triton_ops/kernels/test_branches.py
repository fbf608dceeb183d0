"""Branches with the kernels: the tokens of PyTorch, with one prompt and with several."""

import pytest
import torch

from hf_reasoncache import ReasonAllocCache, SharedBranchCache, decode_graphs
from hf_reasoncache.graphs import CudaRecorder
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.storage import branch_store
from tests.support.models import prompt
from tests.support.ops.generation import host_tensors, small_llama
from tests.support.ops.tape import TapeRecorder
from triton_ops.backend import interpreting, use_backend

POLICY = ReasonAllocCache.policy(budget=7, buffer=1, window=2)


def branches(device, prompts):
    inputs = prompt(batch=prompts, tokens=5, padding=(0, 2))
    inputs = {name: x.repeat_interleave(2, 0).to(device) for name, x in inputs.items()}
    return inputs | {"do_sample": False, "max_new_tokens": 6}


@pytest.mark.parametrize(
    ("prompts", "suffix"), [(1, None), (1, POLICY)], ids=["exact", "compressed"]
)
def test_tokens_equal_those_of_pytorch(prompts, suffix, device):
    model = small_llama(query_heads=2).to(device)
    found = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            cache = SharedBranchCache(model.config, suffix=suffix)
            tokens = model.generate(**branches(device, prompts), **cache_kwarg(cache))
            found.append((tokens, cache.report()))
    (tokens, report), (expected, wanted) = found
    assert "triton" in report.backend and wanted.backend == "torch"
    assert torch.equal(tokens, expected)
    assert (report.evictions > 0) == (suffix is not None)
    assert all(len(layer.store.tree.readers) == prompts for layer in cache.layers)


def test_forked_rows_equal_those_of_pytorch(device):
    """Rows that share a prompt, and two of them what came before a fork."""
    model = small_llama(query_heads=2).to(device)
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for backend in ("triton", "torch"):
        with use_backend(backend), torch.no_grad():
            cache = SharedBranchCache(model.config)
            model(ids[:1], **cache_kwarg(cache))
            cache.fork(0)
            model(ids[:, :1], **cache_kwarg(cache))
            model(ids[:, 1:2], **cache_kwarg(cache))
            cache.fork(1)
            found.append(model(ids[[0, 1, 0], 2:4], **cache_kwarg(cache)).logits)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_graphs_of_branches_give_the_same_tokens(device, monkeypatch):
    monkeypatch.setattr(branch_store, "ROOM", 4)
    model = small_llama(query_heads=2).to(device)
    arguments = branches(device, 1)
    plain, cache = (SharedBranchCache(model.config) for _ in range(2))
    expected = model.generate(**arguments, **cache_kwarg(plain))
    recorder = TapeRecorder(lambda: host_tensors(cache)) if interpreting() else CudaRecorder()
    with decode_graphs(model, cache, recorder=recorder) as graphs:
        assert torch.equal(model.generate(**arguments, **cache_kwarg(cache)), expected)
    assert graphs.replayed > 0
    assert cache.held_positions(0) == plain.held_positions(0)
