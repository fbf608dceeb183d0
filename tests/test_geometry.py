"""The geometry that a config describes is that of the keys that the model makes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Gemma4TextConfig, GPT2Config, T5Config

from hf_reasoncache.geometry import Geometry
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import BUILDERS, build, prompt, stock_keys

FULL = {name: (0, 1, 2) for name in BUILDERS}
FULL |= {name: (0, 2) for name in ("qwen2_sliding", "gemma3", "gpt_oss")}


@pytest.mark.parametrize("name", BUILDERS)
def test_of_a_config(name: str) -> None:
    model = build(name, attention="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompt(), **cache_kwarg(cache))
    found = Geometry.of(model.config)
    assert found.full_attention_layers == FULL[name]
    for index in found.full_attention_layers:
        keys = stock_keys(model, cache.layers[index])
        assert keys.shape[1::2] == (found.kv_heads, found.head_size)


def test_models_without_grouped_heads() -> None:
    found = Geometry.of(GPT2Config(n_layer=2, n_head=4, n_embd=32))
    assert found == Geometry((0, 1), kv_heads=4, head_size=8)


def test_layers_of_their_own_shapes() -> None:
    """Gemma 4's full-attention layers have other heads than its sliding ones."""
    config = Gemma4TextConfig(
        num_hidden_layers=6, num_kv_shared_layers=0, head_dim=64, global_head_dim=128
    )
    assert Geometry.of(config).head_size == 128


def test_unsupported_models() -> None:
    with pytest.raises(ValueError, match="encoder-decoder"):
        Geometry.of(T5Config())


def test_differences() -> None:
    ours, theirs = Geometry((0, 1), 4, 64), Geometry((0, 1, 2), 2, 64)
    assert ours.differences(ours) == []
    assert ours.differences(theirs) == [
        "full_attention_layers [0, 1, 2], not [0, 1]",
        "kv_heads 2, not 4",
    ]
