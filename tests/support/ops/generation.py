"""Small models that generate within seconds in Triton's interpreter, and what their pools hold."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_reasoncache.releases import cache_kwarg
from tests.support.models import SHAPE, prepare

WINDOW = 6
SMALL = SHAPE | dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, head_dim=16)
SLIDING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
HYBRIDS = {
    "gemma2": dict(query_pre_attn_scalar=16),
    "gemma3_text": dict(query_pre_attn_scalar=16),
    "gpt_oss": EXPERTS,
    "qwen2": dict(use_sliding_window=True),
    "ministral": {},
    "qwen3_next": dict(
        layer_types=["linear_attention", "full_attention"],
        num_experts=0,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
    ),
}
"""Model types with one layer of ours and one of transformers', and what their configs need."""


def small_llama(query_heads=4):
    """Two layers and few heads: the interpreter takes 10 ms for each query head of a step."""
    size = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=query_heads, head_dim=16)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | size)).eval()
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("reasoncache")
    return model


def small_latents():
    """Two layers that hold latents of 32 numbers with rotary keys of 8."""
    sizes = SMALL | dict(
        num_key_value_heads=2,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=2,
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model("deepseek_v3", **sizes)
    return prepare(AutoModelForCausalLM.from_config(config), "reasoncache")


def small_hybrid(name, attention="reasoncache"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SMALL | SLIDING | HYBRIDS[name])
    model = prepare(AutoModelForCausalLM.from_config(config), attention)
    if HYBRIDS[name] is EXPERTS:
        # As `generate` does it wherever it is not on a CPU.
        model.set_experts_implementation("batched_mm")
    return model


def generate(model, cache, inputs, **arguments):
    arguments = {"max_new_tokens": 9} | arguments
    return model.generate(**inputs, **arguments, **cache_kwarg(cache), do_sample=False)


def host_tensors(cache):
    """What the pools keep on the CPU."""
    layouts = [layer.store.pool.layout for layer in cache.layers]
    return [layer.store.pool.length for layer in cache.layers] + [
        tensor for each in layouts for tensor in (each.capacity, each.start, each.order)
    ]
