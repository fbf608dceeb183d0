"""Architectures beyond the matrix of the other tests: linear layers beside ours, and pictures."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    DynamicCache,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from examples.research.architectures import REFUSED, WORKS, examine
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import SHAPE


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("qwen3_next", WORKS),
        ("kimi_linear", WORKS),
        # An encoder as a decoder, and a decoder in a model that sees.
        ("bert", WORKS),
        ("gemma3", WORKS),
        ("bloom", REFUSED),
        ("deepseek_v32", REFUSED),
    ],
)
def test_architectures_answer_as_with_the_full_cache_or_are_refused(name, outcome):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {name}")
    found = examine(name)
    assert found.outcome == outcome, found


def test_a_prompt_with_a_picture():
    picture, start, end = 90, 91, 92
    config = Qwen2_5_VLConfig(
        text_config=SHAPE
        | {
            "head_dim": 16,
            "hidden_size": 96,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 96,
        },
        image_token_id=picture,
        video_token_id=93,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 80, (1, 30))
    ids[0, 5:11] = torch.tensor([start, picture, picture, picture, picture, end])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == picture).int(),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }

    def answer(cache, attention):
        model.set_attn_implementation(attention)
        found = model.generate(**inputs, **cache_kwarg(cache), max_new_tokens=40, do_sample=False)
        return found[0, 30:].tolist()

    expected = answer(DynamicCache(config=config.get_text_config()), "sdpa")
    assert answer(ReasonAllocCache(config, budget=None), "reasoncache") == expected
    cache = ReasonAllocCache(config, budget=40, buffer=8)
    assert len(answer(cache, "reasoncache")) == 40 and cache.report().evicted
