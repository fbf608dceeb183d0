"""Which architectures of the installed transformers do the caches work with?

    python -m examples.research.architectures
    python -m examples.research.architectures qwen3_next bloom

Builds a tiny random model of every causal language model that transformers knows, and lets it
answer a left-padded batch. Without a budget the tokens must be those of `DynamicCache`; with one,
tokens must go. The tables go to docs/models.md and docs/results/architectures.csv; an architecture
that runs and answers otherwise ends the command with an error.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from examples.research.tables import insert, write_csv
from hf_reasoncache import ReasonAllocCache, SharedBranchCache, SlidingWindowCompressCache
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.releases import cache_kwarg

OUTCOMES = WORKS, REFUSED, WRONG, UNTRIED = "works", "refused", "wrong", "not tried"

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rotary_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # What older configs call the same.
    "n_embd": 64,
    "n_head": 4,
    "n_positions": 512,
    "d_model": 64,
    "ffn_dim": 64,
    # Experts, and layers with a state.
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_topk": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_ssm": 128,
    # What encoders need to be a decoder.
    "is_decoder": True,
}
"""Whatever of this a config has; the rest stays at its default."""

LATENTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 12,
    # Of some configs, the number of pairs of layers, and the widths of two kinds of them.
    "num_layers": 2,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 1,
    "moe_topk": 2,
    "num_experts_per_tok": 2,
}
"""More of the same for configs with a `kv_lora_rank`; their heads share nothing."""

TOWER: dict[str, Any] = {
    "depth": 1,
    "num_layers": 1,
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "out_hidden_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
"""Sizes of what looks at images or listens, beside a decoder."""

VARIANTS: tuple[dict[str, Any], ...] = (
    {"num_hidden_layers": 4, "n_layer": 4, "sliding_window": None},
    {"num_hidden_layers": 4, "n_layer": 4, "sliding_window": 12},
    {"num_hidden_layers": 6, "n_layer": 6, "sliding_window": 12},
    {"num_hidden_layers": 2, "n_layer": 2},
    {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
    {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
)
"""Tried one after the other: hybrids have a full-attention layer only every few layers."""

LARGEST = 20_000_000
"""Parameters of a model that is still built; some configs cannot be made small this way."""

STEPS, LONG = 20, 60
"""Tokens generated without a budget, and with one."""


@dataclass(frozen=True)
class Finding:
    """What became of one architecture.

    Attributes
    ----------
    name : str
        `model_type` of its config.
    outcome : str
        Works, refused, wrong or not tried.
    layers : str
        Kinds of the cache layers that transformers gives it.
    reason : str
        Why it does not work.
    """

    name: str
    outcome: str
    layers: str = ""
    reason: str = ""


def configure(name: str, variant: Mapping[str, Any]) -> PreTrainedConfig:
    """Make a tiny config of an architecture, and of all that it is made of."""
    kind = CONFIG_MAPPING[name]
    made = _known(kind, _sizes(kind) | variant)
    for part in kind.sub_configs:
        of_part = type(getattr(kind(), part, None))
        if not issubclass(of_part, PreTrainedConfig):
            continue
        decodes = "text" in part
        made[part] = _known(of_part, _sizes(of_part) | (variant if decodes else TOWER))
        made[part]["model_type"] = of_part.model_type
    return kind(**made)


def _sizes(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    return SIZES | LATENTS if "kv_lora_rank" in _names(kind) else SIZES


def _names(kind: type[PreTrainedConfig]) -> set[str]:
    names = {key for base in kind.__mro__ for key in getattr(base, "__annotations__", {})}
    return names | set(kind.attribute_map)


def _known(kind: type[PreTrainedConfig], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return whatever of some sizes a config has."""
    names = _names(kind)
    return {key: value for key, value in sizes.items() if key in names}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a random model; ValueError if it would be large."""
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def answer(model: PreTrainedModel, cache: Cache, tokens: int) -> torch.Tensor:
    """Continue two prompts, one of them padded, greedily."""
    ids = torch.randint(2, 120, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return model.generate(
        ids.masked_fill(mask == 0, 0),
        attention_mask=mask,
        **cache_kwarg(cache),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


def examine(name: str) -> Finding:
    """Try the variants of an architecture until one works."""
    found = Finding(name, UNTRIED, reason="no tiny config")
    for variant in VARIANTS:
        try:
            config = configure(name, variant)
            if refusal := refuses(config):
                # A tiny model may lack what the real ones have.
                if refuses(CONFIG_MAPPING[name]()):
                    found = Finding(name, REFUSED, reason=refusal)
                continue
            model = build(config)
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
            expected = answer(model, DynamicCache(config=model.config), STEPS)
        except Exception as error:
            # Whatever a made-up config breaks in a model is not ours; the table says what it was.
            if found.outcome == UNTRIED:
                found = Finding(name, UNTRIED, reason=_short(error))
            continue
        found = compare(name, model, expected)
        if found.outcome in (WORKS, WRONG):
            return found
    return found


def refuses(config: PreTrainedConfig) -> str:
    """Why our caches refuse a model before it runs; empty if they do not."""
    DynamicCache(config=config)
    try:
        ReasonAllocCache(config, budget=None)
    except ValueError as error:
        return _short(error)
    return ""


def compare(name: str, model: PreTrainedModel, expected: torch.Tensor) -> Finding:
    """Hold our caches against the tokens of `DynamicCache`."""
    config = model.config
    kinds = sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers})
    layers = ", ".join(kinds)
    model.set_attn_implementation("reasoncache")
    exact: tuple[Callable[[], ReasonCache], ...] = (
        lambda: ReasonAllocCache(config, budget=None),
        lambda: SharedBranchCache(config),
    )
    evicting: tuple[Callable[[], ReasonCache], ...] = (
        lambda: ReasonAllocCache(config, budget=40, buffer=8),
        lambda: SlidingWindowCompressCache(config, ratio=0.5, window=16, recent=8),
    )
    try:
        for make in exact:
            cache = make()
            if not torch.equal(answer(model, cache, STEPS), expected):
                kind = type(cache).__name__
                return Finding(name, WRONG, layers, f"{kind}: other tokens than DynamicCache")
        for make in evicting:
            cache = make()
            answer(model, cache, LONG)
            if not cache.report().evicted:
                kind = type(cache).__name__
                return Finding(name, REFUSED, layers, f"{kind}: the model keeps no tokens in it")
    except ValueError as error:
        return Finding(name, REFUSED, layers, _short(error))
    return Finding(name, WORKS, layers)


def _short(error: Exception) -> str:
    """What a message says it got, or its first sentence."""
    sentence = re.split(r"[;.] ", str(error).replace("\n", " "))[0].strip()
    got = sentence.partition(", got ")[2].removesuffix(", which is not supported")
    if got.startswith("one that computes"):
        return "attention code of its own, which no registered function replaces"
    return got or f"{type(error).__name__}: {sentence}"[:120]


def describe(layers: str) -> str:
    """Kinds of layers in words."""
    words = {"Sliding": "sliding-window", "Linear": "linear", "Indexed": "indexed"}
    others = [word for key, word in words.items() if key in layers]
    return "full attention" + (f", {' and '.join(others)} layers beside it" if others else "")


def page(findings: Sequence[Finding]) -> str:
    """The lists of docs/models.md."""
    groups: dict[str, list[str]] = {}
    order = sorted(findings, key=lambda each: (OUTCOMES.index(each.outcome), len(each.layers)))
    for each in order:
        title = {
            WORKS: f"Works, {describe(each.layers)}",
            REFUSED: f"Refused: {each.reason}",
            WRONG: f"Wrong: {each.reason}",
            UNTRIED: "Not tried, since no tiny model was found that runs with DynamicCache",
        }[each.outcome]
        groups.setdefault(title, []).append(f"`{each.name}`")
    note = f"transformers {transformers.__version__}, torch {torch.__version__}, float32, CPU."
    lists = [f"**{title}** ({len(names)}): {', '.join(names)}" for title, names in groups.items()]
    return "\n\n".join([note, *lists])


def main(arguments: Sequence[str] | None = None) -> None:
    """Examine architectures; write the page where all were."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types; all by default")
    parser.add_argument("--document", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/architectures.csv"))
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        parser.error(f"expected causal language models of transformers, got {sorted(unknown)}")
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    findings = []
    for name in tqdm(given.names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        findings.append(examine(name))
        if given.names:
            tqdm.write("  ".join(asdict(findings[-1]).values()))
    if not given.names:
        write_csv(given.output, [asdict(each) for each in findings])
        insert(given.document, "architectures", page(findings))
    for outcome in OUTCOMES:
        print(f"{outcome}: {sum(each.outcome == outcome for each in findings)}")
    if wrong := [each.name for each in findings if each.outcome == WRONG]:
        sys.exit(f"error: other tokens than with DynamicCache: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
