"""Fresh models whose first layer already looks back by fixed distances.

Retrieval needs a head that carries the previous word along (the first half of an induction head).
Found by gradient descent alone it costs most of a training run of an hour; wired through the phases
of the rotary embedding it is there from the first step, and remains trainable.
"""

from __future__ import annotations

import math

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

#: How far back each of the first query heads of layer 0 looks.
OFFSETS = (1, 2, 1, 3)


def build_model(
    architecture: str, vocabulary: int, layers: int, hidden: int, attention: str = "sdpa"
) -> PreTrainedModel:
    """Return an untrained model with 8 query heads and 4 key-value heads of size 32.

    Parameters
    ----------
    architecture
        ``llama`` or ``qwen3``.
    vocabulary
        Number of words; the embedding is padded to a multiple of 16.
    layers, hidden
        Depth and width; the MLP is three times as wide.
    attention
        The attention implementation to run with.

    Raises
    ------
    ValueError
        Unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"unknown architecture: expected one of {sorted(ARCHITECTURES)}, got {architecture!r}"
        )
    config_class, model_class = ARCHITECTURES[architecture]
    config = config_class(
        vocab_size=math.ceil(vocabulary / 16) * 16,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config._attn_implementation = attention
    model = model_class(config)
    _initialize(model)
    return model


@torch.no_grad()
def _initialize(model: PreTrainedModel, embedding_std: float = 0.3, key_gain: float = 1.25) -> None:
    config = model.config
    embedding = model.get_input_embeddings().weight
    embedding.normal_(0, embedding_std)
    embedding[:, 0] = 1.0  # the constant feature that the wired heads read
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        attention.v_proj.weight.normal_(0, config.hidden_size**-0.5)
        width = config.num_attention_heads * config.head_dim
        attention.o_proj.weight.normal_(0, (0.5 if index else 0.7) * width**-0.5)
        if hasattr(attention, "q_norm"):
            # Query-key norms bound the logits; a little gain lets a head single out one of 500
            # tokens from the start.
            attention.q_norm.weight.fill_(key_gain)
            attention.k_norm.weight.fill_(key_gain)
    # RMSNorm divides by the root mean square of an embedding row.
    constant = 1.0 / math.sqrt(
        ((config.hidden_size - 1) * embedding_std**2 + 1) / config.hidden_size
    )
    _wire_offsets(
        model.model.layers[0].self_attn,
        config.head_dim,
        constant,
        config.rope_parameters["rope_theta"],
    )


def _wire_offsets(attention: torch.nn.Module, size: int, constant: float, theta: float) -> None:
    """Make query head h of a layer attend ``OFFSETS[h]`` positions back, whatever the words.

    Queries are the keys turned by the offset, in the fastest frequencies only. Without query-key
    norms the amplitude sets the sharpness (six frequencies); with them the norm's weights do (four,
    so that random heads, which share these weights, stay soft).
    """
    normed = hasattr(attention, "q_norm")
    fastest, amplitude, gain = (4, 4.0, 2.8) if normed else (6, 8.0, 1.0)
    frequencies = theta ** (-torch.arange(0, size, 2).float() / size)
    groups = attention.num_key_value_groups
    for head, offset in enumerate(OFFSETS):
        query = attention.q_proj.weight[head * size : (head + 1) * size]
        key = attention.k_proj.weight[head // groups * size : (head // groups + 1) * size]
        for index, frequency in enumerate(frequencies[:fastest].tolist()):
            key[index, 0] = amplitude / constant
            query[index, 0] = amplitude / constant * math.cos(-offset * frequency)
            query[index + size // 2, 0] = amplitude / constant * math.sin(-offset * frequency)
    if normed:
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight[:fastest] = gain
            norm.weight[size // 2 : size // 2 + fastest] = gain
