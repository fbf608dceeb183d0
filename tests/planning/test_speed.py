"""Ceilings of speed, against figures that are derived elsewhere and against direct sums."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV2Config, DynamicCache

from hf_reasoncache import ReasonAllocCache, SharedBranchCache
from hf_reasoncache.planning import ModelSize, RowWork, prompt_seconds, step_seconds
from hf_reasoncache.planning.devices import DEVICES, Device
from tests.support.models import build, llama_8b

SLOW = Device("slow", 10**9, 1.0, 1e30, "")
WEAK = Device("weak", 10**9, 1e30, 1.0, "")


def work(cache, config, prompt: int, generated: int) -> RowWork:
    return RowWork.of(cache, config, prompt=prompt, generated=generated, dtype=torch.bfloat16)


def test_llama_8b_from_32k_to_1k() -> None:
    """The gains over a full cache that is read once: 1.27x at batch 1, 4.9x at batch 16."""
    config, device = llama_8b(), DEVICES["H200-SXM"]
    size = ModelSize.of(config, torch.bfloat16)
    full = work(ReasonAllocCache(config, budget=None), config, 256, 32512)
    # Attends to 1024 tokens on average: the budget, and half of the buffer.
    small = work(ReasonAllocCache(config, budget=960), config, 256, 32512)
    assert full.own == 32768 * 131072 and small.own == 1024 * 131072
    for rows, gain in ((1, 1.27), (16, 4.9)):
        times = [step_seconds(size, device, [each] * rows) for each in (full, small)]
        assert times[0] / times[1] == pytest.approx(gain, rel=0.01)


def test_dynamic_cache_moves_three_times_as_much() -> None:
    config = llama_8b()
    copied = work(DynamicCache(config=config), config, 256, 744)
    assert copied.own == 3 * 1000 * 131072
    assert copied.flops == work(ReasonAllocCache(config, budget=None), config, 256, 744).flops


def test_latents_are_expanded_by_dynamic_cache_and_by_nobody_else() -> None:
    """DeepSeek-V2-Lite: 16 heads, latents of 512 numbers, rotary keys of 64, the rest 128."""
    sizes = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
    heads = dict(num_attention_heads=16, num_key_value_heads=16)
    dense = dict(num_hidden_layers=2, first_k_dense_replace=2, q_lora_rank=None)
    config = DeepseekV2Config(**dense, **sizes, **heads)
    stock = work(DynamicCache(config=config), config, 256, 744)
    ours = work(ReasonAllocCache(config, budget=None), config, 256, 744)
    assert ours.own == 2 * 1000 * 576 * 2
    assert ours.flops == 2 * 1000 * 16 * 2 * (576 + 512)
    expanded = 16 * (128 + 64 + 128)
    assert stock.own == 3 * ours.own + 2 * 1000 * 2 * expanded * 2
    assert stock.flops == 2 * 1000 * (2 * 512 * 16 * (128 + 128) + 2 * expanded)
    size = ModelSize.of(config, torch.bfloat16)
    assert size.query_width == 16 * (128 + 64)
    pairs = 40 * 41 / 2
    expected = 2 * size.active * 40 + 2 * 2 * expanded * pairs
    assert prompt_seconds(size, WEAK, config, 40) == pytest.approx(expected)


def test_branches_read_their_prompt_once() -> None:
    config = llama_8b()
    size = ModelSize.of(config, torch.bfloat16)
    shared = work(SharedBranchCache(config), config, 4000, 100)
    alone = work(ReasonAllocCache(config, budget=None), config, 4000, 100)
    assert shared.own + shared.shared == alone.own
    assert shared.flops == alone.flops
    together = step_seconds(size, SLOW, [shared], branches=16)
    assert step_seconds(size, SLOW, [alone] * 16) - together == pytest.approx(15 * shared.shared)
    operations = 16 * (2 * size.active + 4 * 4096 * 4100 * 32)
    assert step_seconds(size, WEAK, [shared], branches=16) == pytest.approx(operations)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_reading_a_prompt(name: str) -> None:
    """Each pair of tokens that may see each other, counted."""
    config = build(name, attention="eager").config
    size = ModelSize.of(config, torch.bfloat16)
    prompt, pairs = 40, 0
    for kind in getattr(config, "layer_types", None) or ["full_attention"] * 3:
        reach = 12 if kind == "sliding_attention" else prompt
        pairs += sum(min(token + 1, reach) for token in range(prompt))
    expected = 2 * (2 * size.active * prompt + 4 * 6 * 16 * pairs)
    assert prompt_seconds(size, WEAK, config, prompt, rows=2) == pytest.approx(expected)
    assert prompt_seconds(size, SLOW, config, prompt, rows=2) == size.read_bytes(80)
