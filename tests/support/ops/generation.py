"""Small models that generate within seconds in Triton's interpreter, and what their pools hold."""

from transformers import LlamaConfig, LlamaForCausalLM

from hf_reasoncache.releases import cache_kwarg
from tests.support.models import SHAPE


def small_llama(query_heads=4):
    """Two layers and few heads: the interpreter takes 10 ms for each query head of a step."""
    size = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=query_heads, head_dim=16)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | size)).eval()
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("reasoncache")
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
