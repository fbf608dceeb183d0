"""A recorded decode step, repeated blindly, gives the tokens of an eager generation."""

from dataclasses import replace

import pytest
import torch

from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache, decode_graphs
from hf_reasoncache.graphs import CudaRecorder
from hf_reasoncache.policies import row_budgets
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV
from hf_reasoncache.storage import pool_store
from hf_reasoncache.storage.pool import RaggedPool
from tests.support.models import prompt
from tests.support.ops.generation import host_tensors, small_llama
from tests.support.ops.tape import NotReplayableError, Tape, TapeRecorder
from triton_ops.backend import interpreting

IN_PLACE = dict(budget=8, window=2, head_budgets=False, protect=False)
CASES = {
    # Steps; times recorded and run as usual; class and settings. The first and the last pool grow.
    "everything": (8, (2, 2), ReasonAllocCache, dict(budget=None)),
    "8 bits": (8, (2, 2), ReasonAllocCache, dict(budget=None, storage="fp8")),
    "8 bits, evicting": (
        8,
        (1, 1),
        ReasonAllocCache,
        dict(buffer=3, scorer=RKV(), storage="fp8", **IN_PLACE),
    ),
    "queries": (8, (1, 1), ReasonAllocCache, dict(buffer=3, scorer=RKV(), **IN_PLACE)),
    "mass": (
        5,
        (1, 1),
        ReasonAllocCache,
        dict(buffer=2, scorer=H2O(attention_decay=0.9), **IN_PLACE),
    ),
    # So small a pool grows at every eviction.
    "share": (
        9,
        (3, 3),
        ReasonAllocCache,
        dict(ratio=0.5, min_budget=3, window=2, buffer=3, protect=False),
    ),
    "heads": (
        9,
        (1, 1),
        ReasonAllocCache,
        dict(buffer=2, scorer=RKV(), **IN_PLACE | dict(head_budgets=True)),
    ),
    "windows": (9, (2, 4), SlidingWindowCompressCache, dict(window=4, ratio=0.25, recent=1)),
}


def unsteady_shares(scores, valid, total, **settings):
    more = 2 * (scores.masked_fill(~valid | scores.isinf(), 0).argmax(-1)[:, 0].cpu() % 3 - 1)
    return torch.stack([total // 2 + more, total - total // 2 - more], -1)


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_contents_are_those_without_graphs(name, device, monkeypatch):
    monkeypatch.setattr(pool_store, "FIRST_ROOM", 4)
    steps, counts, kind, settings = CASES[name]
    model = small_llama(query_heads=2).to(device)
    inputs = {k: v.to(device) for k, v in prompt(tokens=9, padding=(0, 3)).items()}
    plain, cache = (kind(model.config, **settings) for _ in range(2))
    if name == "heads":
        # Shares that change at most evictions, by what the heads hold.
        monkeypatch.setattr(row_budgets, "head_budgets", unsteady_shares)
        for layer in (*plain.layers, *cache.layers):
            layer.policy = replace(layer.policy, head_interval=1)
    arguments = inputs | {"max_new_tokens": steps + 1, "do_sample": False}
    expected = model.generate(**arguments, **cache_kwarg(plain))
    recorder = TapeRecorder(lambda: host_tensors(cache)) if interpreting() else CudaRecorder()
    moves, move = [], RaggedPool._move
    monkeypatch.setattr(RaggedPool, "_move", lambda pool, to: moves.append(move(pool, to)))
    with decode_graphs(model, cache, recorder=recorder) as graphs:
        assert torch.equal(model.generate(**arguments, **cache_kwarg(cache)), expected)
    assert (graphs.recorded, graphs.eager) == counts, "evictions in place keep the graph"
    assert len(moves) >= 4 if name == "heads" else not moves
    assert graphs.replayed == steps - sum(counts)
    assert settings.get("budget", 0) is None or cache.report().evictions >= 6
    for layer in range(2):
        assert cache.held_positions(layer) == plain.held_positions(layer)
        mine, its = cache.layers[layer], plain.layers[layer]
        assert mine.seen == its.seen and torch.equal(mine.store.pool.length, its.store.pool.length)
        assert torch.equal(mine.store.pool.device_length.cpu(), mine.store.pool.length)
    assert "forward" not in vars(model)


def test_graphs_may_begin_where_no_query_is_kept_yet(device):
    model = small_llama(query_heads=2).to(device)
    inputs = {k: v.to(device) for k, v in prompt(tokens=9, padding=(0, 3)).items()}
    settings = dict(budget=12, buffer=8, window=2, head_budgets=False, scorer=RKV(queries=2))
    plain, cache = (ReasonAllocCache(model.config, **settings) for _ in range(2))
    arguments = {"do_sample": False, "min_new_tokens": 3}
    for each in (plain, cache):
        first = model.generate(**inputs, **arguments, **cache_kwarg(each), max_new_tokens=6)
    assert cache.layers[0].queries.last() is None
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
    arguments |= {"input_ids": first, "attention_mask": mask, "max_new_tokens": 9}
    expected = model.generate(**arguments, **cache_kwarg(plain))
    recorder = TapeRecorder(lambda: host_tensors(cache)) if interpreting() else CudaRecorder()
    with decode_graphs(model, cache, recorder=recorder) as graphs:
        assert torch.equal(model.generate(**arguments, **cache_kwarg(cache)), expected)
    assert graphs.replayed and cache.report().evictions >= 2
    for layer in range(2):
        assert cache.held_positions(layer) == plain.held_positions(layer)


def test_a_mask_that_hides_is_honoured_between_replays(device):
    """Rows of a chat that ended apart: the next turn hides columns, a later step one more."""
    model = small_llama(query_heads=2).to(device)
    inputs = {k: v.to(device) for k, v in prompt(tokens=9, padding=(0, 3)).items()}
    seen, hidden = inputs["attention_mask"].shape[1], {3: (4, 5), 6: (4, 5, 8)}

    def run(cache, forward):
        mask, found = inputs["attention_mask"], []
        with torch.no_grad():
            forward(**inputs, **cache_kwarg(cache), use_cache=True)
            for step in range(9):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                mask[1, list(hidden.get(step, ()))] = 0
                ids = torch.full((2, 1), 5 + step, device=device)
                at = torch.full_like(ids, seen + step)
                settings = dict(attention_mask=mask, position_ids=at, **cache_kwarg(cache))
                found.append(forward(input_ids=ids, use_cache=True, **settings).logits)
        return torch.cat(found, 1)

    plain, cache = (ReasonAllocCache(model.config, budget=None) for _ in range(2))
    expected = run(plain, model)
    recorder = TapeRecorder(lambda: host_tensors(cache)) if interpreting() else CudaRecorder()
    with decode_graphs(model, cache, recorder=recorder) as graphs:
        got = run(cache, model)
    assert (got - expected).abs().max() < 1e-4
    assert graphs.replayed >= 4 and graphs.recorded + graphs.eager + graphs.replayed == 9
    assert cache.held_positions(0)[1][0] == [3, 6, 7, *range(9, 18)]


def test_the_tape_refuses_what_a_graph_cannot_hold():
    value = torch.tensor([3.0, 0.0])
    for step in (lambda: value.sum().item(), lambda: value.nonzero(), lambda: bool(value[0])):
        with pytest.raises(NotReplayableError), Tape():
            step()
    with pytest.raises(NotReplayableError):
        TapeRecorder(lambda: [value]).record(lambda: value.to("cpu"))
    with pytest.raises(NotReplayableError):
        TapeRecorder().record(value.tolist)
