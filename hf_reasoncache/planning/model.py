"""How large a model is, and what a step of it reads and computes, from its config alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hf_reasoncache.geometry import query_size

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_USED = ("num_experts_per_tok", "experts_per_token", "top_k_experts")


@dataclass(frozen=True)
class ModelSize:
    """Weights of a causal language model, and the widths that decide its activations.

    Attributes
    ----------
    name : str
    parameters : int
        All of them, tied ones counted once.
    dense : int
        Parameters of the decoder that every token is multiplied with, the output layer among them.
    routed : int
        Parameters of the routed experts of all layers, of which a token uses some; 0 without any.
    experts, used : int
        Experts of a layer, and how many of them a token uses.
    weight_bytes : int
        Of all parameters in memory.
    dtype : torch.dtype
        Of weights, keys, values and activations.
    hidden, intermediate, query_width, vocabulary : int
        Numbers per token: of the residual stream, inside the widest MLP that a token runs through,
        of all query heads together, and of the logits.
    """

    name: str
    parameters: int
    dense: int
    routed: int
    experts: int
    used: int
    weight_bytes: int
    dtype: torch.dtype
    hidden: int
    intermediate: int
    query_width: int
    vocabulary: int

    @staticmethod
    def of(
        config: PretrainedConfig,
        dtype: torch.dtype,
        *,
        name: str = "",
        weight_bytes: int | None = None,
    ) -> ModelSize:
        """Build the model on the meta device, without any data, and count.

        Parameters
        ----------
        config : PretrainedConfig
        dtype : torch.dtype
        name : str
        weight_bytes : int, optional
            Of quantised weights, which a config does not tell.

        Raises
        ------
        ValueError
            If the config is not that of a causal language model, its weights are quantised and
            `weight_bytes` is missing, or it has experts and does not say how many a token uses.
        """
        if getattr(config, "quantization_config", None) is not None and weight_bytes is None:
            raise ValueError(
                f"{name or config.model_type}: expected plain weights, got quantised ones, whose "
                "size does not follow from the config; give --weights SIZE (that of the files)."
            )
        model = _on_meta(config, dtype)
        decoder = config.get_text_config(decoder=True)
        read = dict(model.get_decoder().named_parameters())
        embedding = model.get_input_embeddings().weight
        output = model.get_output_embeddings()
        dense = routed = 0
        for label, weight in read.items():
            if ".experts." in f".{label}":
                routed += weight.numel()
            elif weight is not embedding:
                dense += weight.numel()
        if output is not None:
            dense += sum(weight.numel() for weight in output.parameters())
        experts, used = _routing(decoder, routed > 0)
        parameters = sum(weight.numel() for weight in model.parameters())
        return ModelSize(
            name=name or decoder.model_type,
            parameters=parameters,
            dense=dense,
            routed=routed,
            experts=experts,
            used=used,
            weight_bytes=parameters * dtype.itemsize if weight_bytes is None else weight_bytes,
            dtype=dtype,
            hidden=decoder.hidden_size,
            intermediate=_intermediate(decoder, used if routed else 1),
            query_width=decoder.num_attention_heads * query_size(decoder),
            vocabulary=decoder.vocab_size,
        )

    @property
    def active(self) -> float:
        """Parameters that one token is multiplied with."""
        return self.dense + self.routed * self.used / self.experts

    def read_bytes(self, tokens: float) -> float:
        """Bytes of weights that a forward of so many tokens reads.

        Of experts those that at least one token uses, if each token chooses evenly and
        independently; real routers are less even, which reads less.
        """
        chosen = 1 - (1 - self.used / self.experts) ** tokens
        return (self.dense + self.routed * chosen) * self.weight_bytes / self.parameters

    def activation_bytes(self, tokens: int, rows: int) -> int:
        """Bytes of activations while `tokens` tokens of `rows` rows are read at once, about.

        Four times the residual stream (embeddings, a layer's input, its sum with the attention, and
        the norm of that), and the larger of queries, keys, values and their mix, and three tensors
        inside the MLP; and the logits of one position per row, once in the model's dtype and once
        in float32. Within 10% of what Llama and Qwen3 allocate (tests/planning/test_model.py).
        """
        stream = 4 * self.hidden
        widest = max(4 * self.query_width, 3 * self.intermediate)
        logits = rows * self.vocabulary * (self.dtype.itemsize + 4)
        return tokens * self.dtype.itemsize * (stream + widest) + logits


def _on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{config.model_type}: expected the config of a causal language model, got "
            f"{type(config).__name__}; plan the model that generates."
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def _routing(decoder: PretrainedConfig, has_experts: bool) -> tuple[int, int]:
    if not has_experts:
        return 1, 1
    experts = next((n for key in _EXPERTS if (n := getattr(decoder, key, None))), None)
    used = next((n for key in _USED if (n := getattr(decoder, key, None))), None)
    if experts is None or used is None:
        raise ValueError(
            f"{decoder.model_type}: expected a config that says how many experts a layer has "
            f"({', '.join(_EXPERTS)}) and a token uses ({', '.join(_USED)}), got neither or one."
        )
    return experts, used


def _intermediate(decoder: PretrainedConfig, used: int) -> int:
    per_expert = getattr(decoder, "moe_intermediate_size", None)
    width = getattr(decoder, "intermediate_size", None) or 4 * decoder.hidden_size
    return max(width, used * (per_expert or width)) if used > 1 else width
