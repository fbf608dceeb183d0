"""Tiny random models of the architectures that the contract covers, and a config of real size."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 97
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    # Larger than usual, so that random attention is peaked and a wrong mask changes the output.
    initializer_range=0.2,
)
LAYERS, HEADS, HEAD_SIZE = 3, 2, 16
HYBRID = ["full_attention", "sliding_attention", "full_attention"]
SLIDING_FIRST = ["sliding_attention", "full_attention", "full_attention"]
LATENT = SHAPE | dict(
    num_key_value_heads=6,
    kv_lora_rank=20,
    q_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
)
"""Multi-head latent attention: sizes that differ, so that none can be taken for another."""
EXPERTS = dict(
    n_routed_experts=2,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
)


def latent(name, **more):
    """A function that builds a causal model with latents."""
    return lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **LATENT | more))


BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=16)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "qwen2_sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=12, layer_types=HYBRID)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, head_dim=16, sliding_window=None)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SHAPE, head_dim=16, query_pre_attn_scalar=16, sliding_window=12, layer_types=HYBRID
        )
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **SHAPE,
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=12,
            layer_types=HYBRID,
        )
    ),
    "deepseek_v3": latent(
        "deepseek_v3",
        **EXPERTS,
        first_k_dense_replace=1,
        # YaRN changes the scale of the logits.
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "minicpm3": latent("minicpm3", scale_emb=1, scale_depth=1.7),
}
DELTA = ["linear_attention", "full_attention", "full_attention"]
LATENT_MODELS = {
    "deepseek_v3": BUILDERS["deepseek_v3"],
    "minicpm3": BUILDERS["minicpm3"],
    "deepseek_v2": latent("deepseek_v2", **EXPERTS, first_k_dense_replace=1),
    "glm4_moe_lite": latent("glm4_moe_lite", **EXPERTS),
    "youtu": latent("youtu"),
    "axk1": latent("axk1", **EXPERTS),
    # Two attentions in each layer.
    "longcat_flash": latent(
        "longcat_flash",
        num_layers=2,
        num_hidden_layers=4,
        head_dim=8,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=32,
        n_routed_experts=2,
        moe_topk=2,
        zero_expert_num=1,
    ),
    "kimi_linear": latent("kimi_linear", **EXPERTS, layer_types=DELTA, num_experts=2),
    "bailing_hybrid": latent("bailing_hybrid", **EXPERTS, layer_types=DELTA, num_experts=2),
}
"""Models with latents that the installed transformers knows."""
LATENT_MODELS = {name: each for name, each in LATENT_MODELS.items() if name in CONFIG_MAPPING}


def stock_keys(model: torch.nn.Module, layer) -> torch.Tensor:
    """The keys that a layer of `DynamicCache` holds, latents with the rotary keys behind them."""
    latents = bool(getattr(model.config, "kv_lora_rank", None))
    return torch.cat([layer.keys, layer.values], dim=-1) if latents else layer.keys


def prepare(model: torch.nn.Module, attention: str) -> torch.nn.Module:
    """Eval mode, sinks that differ, no end of text, and this attention."""
    model.eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    model.generation_config.eos_token_id = None
    model.set_attn_implementation(attention)
    return model


def build(name: str, attention: str = "reasoncache", seed: int = 0) -> torch.nn.Module:
    """A random model in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return prepare((BUILDERS | LATENT_MODELS)[name](), attention)


def sliding_first(name: str, attention: str = "reasoncache") -> torch.nn.Module:
    """A hybrid whose first layer is none of ours: "gemma3" or "gpt_oss"."""
    torch.manual_seed(0)
    shape = dict(**SHAPE, head_dim=16, sliding_window=12, layer_types=SLIDING_FIRST)
    if name == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, query_pre_attn_scalar=16))
    else:
        config = GptOssConfig(**shape, num_local_experts=2, num_experts_per_tok=1)
        model = GptOssForCausalLM(config)
    return prepare(model, attention)


def llama_8b() -> LlamaConfig:
    """Llama 3.1 8B."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )


def prompt(batch: int = 2, tokens: int = 21, padding: tuple[int, ...] = (0, 7), seed: int = 1):
    """Left-padded random prompts: dict of input_ids and attention_mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding[:batch]):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
