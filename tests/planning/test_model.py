"""Counted weights against models that exist, and against what is published."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    T5Config,
)

from examples.benchmarks.prefill_memory import Allocations
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.planning import ModelSize, row_bytes
from hf_reasoncache.planning.model import _routing
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import BUILDERS, build, llama_8b


@pytest.mark.parametrize("name", BUILDERS)
def test_weights_are_those_of_the_model(name: str) -> None:
    model = build(name, attention="eager")
    size = ModelSize.of(model.config, torch.float32)
    assert size.parameters == sum(weight.numel() for weight in model.parameters())
    assert size.weight_bytes == sum(
        storage.nbytes()
        for storage in {w.data_ptr(): w.untyped_storage() for w in model.parameters()}.values()
    )
    inputs, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    untied = 0 if inputs is output else inputs.numel()
    assert size.dense + size.routed == size.parameters - untied


def test_llama_as_published() -> None:
    size = ModelSize.of(llama_8b(), torch.bfloat16, name="8B")
    assert size.parameters == 8_030_261_248
    assert size.active == size.parameters - 128256 * 4096
    assert size.read_bytes(1) == size.read_bytes(500) == 2 * size.active


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        # 46.7 and 12.9 billion (Mixtral 8x7B), 30.5 and 3.3 (Qwen3-30B-A3B), input embeddings
        # counted, which no product reads.
        (MixtralConfig(), 46.7, 12.9),
        (
            Qwen3MoeConfig(
                num_hidden_layers=48,
                num_experts=128,
                num_experts_per_tok=8,
                hidden_size=2048,
                moe_intermediate_size=768,
                num_attention_heads=32,
                num_key_value_heads=4,
                head_dim=128,
                vocab_size=151936,
            ),
            30.5,
            3.3,
        ),
    ],
    ids=["mixtral", "qwen3-moe"],
)
def test_experts_as_published(config, total: float, active: float) -> None:
    size = ModelSize.of(config, torch.bfloat16)
    embeddings = config.vocab_size * config.hidden_size
    assert size.parameters / 1e9 == pytest.approx(total, abs=0.05)
    assert (size.active + embeddings) / 1e9 == pytest.approx(active, abs=0.06)
    assert size.read_bytes(1) == pytest.approx(2 * size.active)
    # Each token picks its experts; many tokens pick all.
    assert size.read_bytes(1) < size.read_bytes(4) < size.read_bytes(1000)
    assert size.read_bytes(10_000) == pytest.approx(2 * (size.parameters - embeddings))


def test_experts_that_a_batch_reads() -> None:
    """The expectation over even choices, against drawing them."""
    size = ModelSize.of(MixtralConfig(num_hidden_layers=1), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(4000, 3, 8, generator=generator).topk(2).indices
    seen = torch.zeros(4000, 8).scatter_(1, chosen.flatten(1), 1.0).sum(-1).mean() / 8
    assert (size.read_bytes(3) / 2 - size.dense) / size.routed == pytest.approx(
        float(seen), abs=0.01
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("compressed", [False, True])
def test_memory_while_a_prompt_is_read(kind: str, compressed: bool) -> None:
    """Everything allocated in the forward, activations too, against the plan."""
    shape = dict(vocab_size=500, num_hidden_layers=4, num_attention_heads=8, hidden_size=256)
    if kind == "llama":
        config = LlamaConfig(**shape, num_key_value_heads=2, intermediate_size=768)
        model = LlamaForCausalLM(config)
    else:
        config = Qwen3Config(**shape, num_key_value_heads=2, intermediate_size=256, head_dim=32)
        model = Qwen3ForCausalLM(config)
    model = model.eval().bfloat16()
    model.set_attn_implementation("reasoncache" if compressed else "sdpa")
    cache = ReasonAllocCache(config, budget=600) if compressed else DynamicCache(config=config)
    size = ModelSize.of(config, torch.bfloat16)
    row = row_bytes(cache, config, prompt=512, generated=0, dtype=torch.bfloat16)
    ids = torch.randint(3, 500, (2, 512))
    with torch.no_grad(), Allocations() as mode:
        model(input_ids=ids, **cache_kwarg(cache), use_cache=True, logits_to_keep=1)
    planned = 2 * row.prompt + size.activation_bytes(2 * 512, 2)
    assert planned == pytest.approx(mode.peak, rel=0.1)


def test_other_kinds_of_models() -> None:
    with pytest.raises(ValueError, match="expected the config of a causal language model, got T5"):
        ModelSize.of(T5Config(), torch.bfloat16)


def test_quantised_weights_need_their_size() -> None:
    config = LlamaConfig(num_hidden_layers=1, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="expected plain weights, got quantised ones"):
        ModelSize.of(config, torch.bfloat16)
    size = ModelSize.of(config, torch.bfloat16, weight_bytes=1_000_000)
    assert size.weight_bytes == 1_000_000
    assert size.read_bytes(1) == pytest.approx(1_000_000 * size.active / size.parameters)


def test_experts_without_their_number() -> None:
    with pytest.raises(ValueError, match="expected a config that says how many experts"):
        _routing(SimpleNamespace(model_type="x", num_experts=8), True)
