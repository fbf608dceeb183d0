"""What a model's config says about its full-attention layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer

from hf_reasoncache.messages import shown


@dataclass(frozen=True)
class Geometry:
    """Where a model keeps keys and values that a budget can shrink.

    Attributes
    ----------
    full_attention_layers : tuple of int
        Indices in the model of the full-attention layers, ascending.
    kv_heads : int
        KV heads of one of these layers.
    head_size : int
        Numbers in one key. Of multi-head latent attention, whose layers have one head for this
        purpose: those of a latent and the rotary key.

    Raises
    ------
    ValueError
        If the indices do not ascend from 0 or more, or a count is below 1.
    """

    full_attention_layers: tuple[int, ...]
    kv_heads: int
    head_size: int

    def __post_init__(self) -> None:
        """Check and normalise."""
        layers = self.full_attention_layers
        if not isinstance(layers, list | tuple) or not layers or not all(map(_counts, layers)):
            raise ValueError(
                f"full_attention_layers: expected layer indices, at least one, got {shown(layers)}."
            )
        if any(below >= above for below, above in pairwise(layers)):
            raise ValueError(
                f"full_attention_layers: expected ascending layer indices, got {shown(layers)}."
            )
        for name in ("kv_heads", "head_size"):
            value = getattr(self, name)
            if not _counts(value) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {shown(value)}.")
        object.__setattr__(self, "full_attention_layers", tuple(layers))

    @staticmethod
    def of(config: PretrainedConfig) -> Geometry:
        """Read the geometry of a supported model from `model.config`.

        Raises
        ------
        ValueError
            If the model is not supported.
        """
        layers = supported_layers(config)
        decoder = config.get_text_config(decoder=True)
        ours = tuple(index for index, layer in enumerate(layers) if type(layer) is DynamicLayer)
        shapes = {head_shape(decoder, index) for index in ours}
        if len(shapes) > 1:
            raise ValueError(
                f"{decoder.model_type}: expected full-attention layers that share KV heads and "
                f"head size, got {shown(sorted(shapes))}; profiles do not describe such a model."
            )
        return Geometry(ours, *shapes.pop())

    def differences(self, other: Geometry) -> list[str]:
        """Say in which fields `other` differs, one phrase each: "kv_heads 4, not 8"."""
        return [
            f"{name} {_few(theirs)}, not {_few(ours)}"
            for name, ours in vars(self).items()
            if (theirs := getattr(other, name)) != ours
        ]


def _few(value: int | tuple[int, ...]) -> str:
    return shown(list(value) if isinstance(value, tuple) else value, 60)


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _of_layer(decoder: PretrainedConfig, index: int) -> PretrainedConfig:
    """Return the config of one layer, which most models have in common."""
    is_heterogeneous = getattr(decoder, "is_heterogeneous", False)
    layer: PretrainedConfig = decoder.per_layer_config[index] if is_heterogeneous else decoder
    return layer


def latent_rank(decoder: PretrainedConfig, index: int) -> int:
    """Return the numbers of a latent in one layer; 0 without multi-head latent attention."""
    return getattr(_of_layer(decoder, index), "kv_lora_rank", None) or 0


def numbers_per_token(decoder: PretrainedConfig, index: int) -> int:
    """Return how many numbers transformers' own caches hold of a token in one layer."""
    heads, size = head_shape(decoder, index)
    return size if latent_rank(decoder, index) else 2 * heads * size


@dataclass(frozen=True)
class AttentionWork:
    """What attention of one layer does in one step, from its config.

    Attributes
    ----------
    pair : int
        Operations of a query, in all heads, for a token that it attends to.
    expansion : int
        Operations that make keys and values of a cached token first; 0 where these are cached.
    expanded : int
        Numbers that this writes and attention reads, per token.
    """

    pair: int
    expansion: int = 0
    expanded: int = 0

    @staticmethod
    def of(decoder: PretrainedConfig, index: int, *, absorbed: bool) -> AttentionWork:
        """Count; `absorbed` says whether latents are attended to as they are."""
        layer, heads = _of_layer(decoder, index), decoder.num_attention_heads
        size = head_shape(decoder, index)[1]
        rank = latent_rank(decoder, index)
        if not rank:
            return AttentionWork(4 * heads * size)
        if absorbed:
            return AttentionWork(2 * heads * (size + rank))
        made = layer.qk_nope_head_dim + layer.v_head_dim
        expanded = heads * (made + layer.qk_rope_head_dim)
        return AttentionWork(2 * expanded, 2 * rank * heads * made, expanded)


def head_shape(decoder: PretrainedConfig, index: int) -> tuple[int, int]:
    """Return the KV heads and the head size of one layer of a decoder's config."""
    decoder = _of_layer(decoder, index)
    if rank := latent_rank(decoder, index):
        return 1, rank + decoder.qk_rope_head_dim
    heads = decoder.num_attention_heads
    kv_heads = getattr(decoder, "num_key_value_heads", None) or heads
    return kv_heads, getattr(decoder, "head_dim", None) or decoder.hidden_size // heads


def query_size(decoder: PretrainedConfig) -> int:
    """Return the numbers of one query, as the model makes it."""
    if latent_rank(decoder, 0):
        of_first = _of_layer(decoder, 0)
        return int(of_first.qk_nope_head_dim + of_first.qk_rope_head_dim)
    heads = decoder.num_attention_heads
    return getattr(decoder, "head_dim", None) or decoder.hidden_size // heads


def rotary_frequencies(config: PretrainedConfig) -> list[float]:
    """Return the angle per position of each pair of numbers in a full-attention layer's queries.

    Raises
    ------
    ValueError
        If the angles are not position times a constant ("default", "linear" or "llama3" RoPE of
        the whole head), by the name of the kind.
    """
    decoder = config.get_text_config(decoder=True)
    found = getattr(decoder, "rope_parameters", None) or {}
    found = found.get("full_attention", found)
    if latent_rank(decoder, 0):
        raise ValueError(
            f"{decoder.model_type}: expected queries that RoPE turns as a whole, got multi-head "
            "latent attention, which turns a part of them."
        )
    kind, size = found.get("rope_type"), Geometry.of(config).head_size
    share = found.get("partial_rotary_factor", getattr(decoder, "partial_rotary_factor", None))
    if kind not in ("default", "linear", "llama3") or share not in (None, 1.0):
        got = f"RoPE of kind {shown(kind)}" + ("" if share in (None, 1.0) else f" on {share} of it")
        raise ValueError(
            f"{decoder.model_type}: expected default, linear or llama3 RoPE of the whole head, got "
            f"{got}, which cannot be turned back from a config."
        )
    plain = [found["rope_theta"] ** (-2 * pair / size) for pair in range(size // 2)]
    if kind == "default":
        return plain
    if kind == "linear":
        return [each / found["factor"] for each in plain]
    return [_llama3(each, found) for each in plain]


def _llama3(frequency: float, settings: dict[str, Any]) -> float:
    """Frequency of Llama 3's RoPE: long waves are stretched, and those between in part."""
    turns = settings["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - smooth) * frequency / settings["factor"] + smooth * frequency


def supported_layers(config: PretrainedConfig) -> list[Any]:
    """Return transformers' own layers for a model, or say why the model is not supported.

    Raises
    ------
    ValueError
        Naming the model type and the feature that is missing.
    """
    if not isinstance(config, PretrainedConfig):
        raise ValueError(
            f"config: expected a transformers config, got {type(config).__name__}; pass "
            "model.config."
        )
    decoder = config.get_text_config(decoder=True)
    name = decoder.model_type

    def refuse(feature: str) -> ValueError:
        return ValueError(
            f"{name}: expected a decoder with standard full-attention layers, got {feature}, which "
            "is not supported; use DynamicCache for this model."
        )

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("an encoder-decoder")
    layers = DynamicCache(config=decoder).layers
    if any(isinstance(layer, DynamicIndexedLayer) for layer in layers):
        raise refuse("sparse attention with an indexer (DSA)")
    if shares_layers(decoder):
        raise refuse("layers that reuse the keys and values of other layers")
    if not any(type(layer) is DynamicLayer for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise refuse(f"no full-attention layer (only {', '.join(kinds)})")
    return layers


def shares_layers(decoder: PretrainedConfig) -> bool:
    """Whether some layers read other layers' keys and values."""
    modes = getattr(decoder, "kv_sharing_modes", None) or ()
    return "reuse" in modes or bool(getattr(decoder, "num_kv_shared_layers", 0))
