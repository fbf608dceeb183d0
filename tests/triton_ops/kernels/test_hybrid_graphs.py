"""Layers of transformers beside ours in a recorded step: windows that slide, and linear attention.

Every step of a repeated recording gives the logits of a step as usual, before, at and after the end
of the window, with padding, and where a mask hides what is still in the window.
"""

import pytest
import torch

from hf_reasoncache import ReasonAllocCache, decode_graphs, disable_graphs, enable_graphs
from hf_reasoncache.graphs import CudaRecorder
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.sliding import SlidingLayer
from tests.support.fake_device import DEVICE, fake_device
from tests.support.models import prompt
from tests.support.ops.generation import HYBRIDS, WINDOW, small_hybrid
from tests.support.ops.tape import TapeRecorder
from triton_ops.backend import interpreting

STEPS = 7


def recorder():
    return TapeRecorder() if interpreting() else CudaRecorder()


def answers(model, cache, inputs, steps=STEPS):
    """Tokens, and the logits of every step."""
    found = model.generate(
        **inputs,
        **cache_kwarg(cache),
        max_new_tokens=steps + 1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences, torch.stack(found.logits)


def require_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() < 1e-4


def sent(device, tokens, padding):
    return {k: v.to(device) for k, v in prompt(tokens=tokens, padding=padding).items()}


@pytest.mark.parametrize(
    ("name", "attention", "tokens", "padding"),
    [
        *((name, "reasoncache", 4, (0, 2)) for name in HYBRIDS),
        ("gemma3_text", "reasoncache", WINDOW + 3, (0, 0)),
        ("gemma3_text", "reasoncache", WINDOW + 3, (0, 5)),
        ("gemma3_text", "reasoncache_eager", 4, (0, 2)),
        ("gpt_oss", "reasoncache_eager", WINDOW + 3, (0, 0)),
    ],
)
def test_a_hybrid_gives_the_logits_without_graphs(name, attention, tokens, padding, device):
    """A short prompt leaves the window open, a long one is over it."""
    model, inputs = small_hybrid(name, attention).to(device), sent(device, tokens, padding)
    plain, cache = (ReasonAllocCache(model.config, budget=None) for _ in range(2))
    expected = answers(model, plain, inputs)
    with decode_graphs(model, cache, recorder=recorder()) as graphs:
        found = answers(model, cache, inputs)
    require_same(found, expected)
    assert (graphs.recorded, graphs.eager, graphs.replayed) == (1, 1, STEPS - 2)
    assert "forward" not in vars(model)


def test_evictions_turns_and_hidden_columns(device):
    """A ring ends where a prompt goes on, and a mask that hides reaches what is in the window."""
    model = small_hybrid("gemma3_text").to(device)
    settings = dict(budget=8, buffer=2, window=2, head_budgets=False, protect=False)
    first = sent(device, 5, (0, 2))
    more = torch.randint(3, 90, (2, 4), device=device)

    def talk(cache):
        turn = answers(model, cache, first)
        ids = torch.cat([turn[0], more], 1)
        mask = torch.nn.functional.pad(
            first["attention_mask"], (0, ids.shape[1] - first["input_ids"].shape[1]), value=1
        )
        mask[0, -3] = 0
        return turn, answers(model, cache, {"input_ids": ids, "attention_mask": mask})

    plain, cache = (ReasonAllocCache(model.config, **settings) for _ in range(2))
    expected = talk(plain)
    with decode_graphs(model, cache, recorder=recorder()) as graphs:
        found = talk(cache)
    for mine, its in zip(found, expected, strict=True):
        require_same(mine, its)
    assert graphs.replayed >= STEPS and cache.report().evictions >= 4
    assert cache.report().evictions == plain.report().evictions
    assert cache.held_positions(1) == plain.held_positions(1)
    window, its = cache.layers[0], plain.layers[0]
    assert isinstance(window, SlidingLayer) and window._ring is not None
    assert window.cumulative_length == its.cumulative_length
    torch.testing.assert_close(window.keys, its.keys)
    torch.testing.assert_close(window.values, its.values)


def test_graphs_stay_on_for_every_cache_of_a_model(device):
    """Enabled once: caches side by side, another one off, and none after it was disabled."""
    model = small_hybrid("qwen2").to(device)
    inputs = sent(device, 4, (0, 0))
    make = (lambda _: TapeRecorder()) if interpreting() else CudaRecorder
    caches = [ReasonAllocCache(model.config, budget=None) for _ in range(4)]
    expected = answers(model, caches[0], inputs, steps=4)
    enable_graphs(model, make_recorder=make)
    enable_graphs(model, make_recorder=make)
    caches[2].graphs = "off"
    for cache in caches[1:3]:
        require_same(answers(model, cache, inputs, steps=4), expected)
    assert str(caches[1].graph_use) == "recorded 1, replayed 2, eager 1"
    assert "graphs: recorded 1, replayed 2, eager 1" in str(caches[1].report())
    assert "graphs: off" in str(caches[2].report())
    disable_graphs(model)
    require_same(answers(model, caches[3], inputs, steps=4), expected)
    assert caches[3].graph_use.recorded == 0 and "forward" not in vars(model)


class Counting:
    """Counts what a step asks of the fake device while it is recorded."""

    def __init__(self, device):
        self.device, self.events = device, []

    def record(self, step):
        with self.device.counting() as self.events:
            return step(), step


@pytest.mark.skipif(not interpreting(), reason="the fake device needs Triton's interpreter")
@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "qwen3_next"])
def test_a_recorded_step_of_a_hybrid_neither_waits_nor_copies(name):
    inputs = prompt(tokens=WINDOW + 1, padding=(0, 3))
    with fake_device() as device, torch.no_grad():
        model = small_hybrid(name).to(DEVICE)
        cache, recorder = ReasonAllocCache(model.config, budget=None), Counting(device)
        with decode_graphs(model, cache, recorder=recorder) as graphs:
            for end in (WINDOW + 1, WINDOW + 2, WINDOW + 3):
                ids = torch.full((2, 1), 5) if end > WINDOW + 1 else inputs["input_ids"]
                mask = torch.nn.functional.pad(
                    inputs["attention_mask"], (0, end - WINDOW - 1), value=1
                )
                model(
                    input_ids=ids.to(DEVICE),
                    attention_mask=mask.to(DEVICE),
                    position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :].to(DEVICE),
                    **cache_kwarg(cache),
                )
    assert graphs.recorded == 1 and recorder.events
    waits = {each for each in recorder.events if each.kind in ("synchronisation", "copy")}
    assert not waits
