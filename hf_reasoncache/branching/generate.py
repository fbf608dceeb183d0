"""Many continuations of each prompt, the prompt read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from hf_reasoncache.branching.prefill_once import prefill_once
from hf_reasoncache.cache import CacheFactory
from hf_reasoncache.caches.shared_branch import SharedBranchCache
from hf_reasoncache.releases import CACHE_ARGUMENT, cache_kwarg, take_cache


@torch.no_grad()
def branch_generate(
    model: Any,
    inputs: torch.Tensor | Mapping[str, torch.Tensor],
    *,
    num_branches: int,
    past_key_values: SharedBranchCache | None = None,
    cache: SharedBranchCache | None = None,
    suffix: CacheFactory | None = None,
    drop_finished: bool = True,
    **generate_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Generate several branches of each prompt; the prompt is read and stored once.

    Parameters
    ----------
    model : PreTrainedModel
        With `attn_implementation="reasoncache"`.
    inputs : LongTensor[P, T] or mapping
        Token ids, or what a tokenizer returns: `input_ids` and, if prompts are left-padded,
        `attention_mask`.
    num_branches : int
        Sequences to return per prompt (`num_return_sequences`); with `num_beams`, the best of them.
    past_key_values, cache : SharedBranchCache, optional
        Empty. Pass your own to look at it later; by default one is made. Two names of one argument,
        with every release of transformers.
    suffix : CacheFactory, optional
        How branches are compressed, if no cache is passed; see `SharedBranchCache`.
    drop_finished : bool
        See `prefill_once`; beams are never dropped.
    **generate_kwargs
        For `model.generate`: `max_new_tokens`, `do_sample`, `temperature`, `stopping_criteria` ...

    Returns
    -------
    LongTensor[P * num_branches, T + new] or GenerateDecoderOnlyOutput
        As generate, branches of a prompt beside each other.

    Raises
    ------
    ValueError
        If an argument does not fit; see also `prefill_once`.
    """
    held = take_cache({"past_key_values": past_key_values, "cache": cache})
    if held is None:
        held = SharedBranchCache(model.config, suffix=suffix)
    elif suffix is not None:
        raise ValueError(
            "suffix: expected either a cache or a policy for one, got both; pass the policy to "
            "SharedBranchCache."
        )
    elif not isinstance(held, SharedBranchCache) or held.get_seq_length():
        raise ValueError(
            f"{CACHE_ARGUMENT}: expected an empty SharedBranchCache, got {type(held).__name__} "
            f"with {held.get_seq_length()} tokens; reset() it, or call model.generate."
        )
    if generate_kwargs.get("assistant_model") is not None:
        raise ValueError(
            "assistant_model: expected None, got an assistant; assisted decoding has one row, so "
            "there is nothing to share."
        )
    if not isinstance(inputs, Mapping):
        inputs = {"input_ids": inputs}
    if "input_ids" not in inputs:
        raise ValueError(
            f"inputs: expected input_ids, got {sorted(inputs)}; branches need prompts of tokens."
        )
    if not isinstance(num_branches, int) or num_branches < 1:
        raise ValueError(f"num_branches: expected an integer >= 1, got {num_branches!r}.")
    arguments = dict(
        **inputs,
        **generate_kwargs,
        num_return_sequences=num_branches,
        **cache_kwarg(held),
    )
    beams = _beams(model, generate_kwargs)
    if beams == 1:
        return model.generate(
            **arguments, custom_generate=prefill_once, drop_finished=drop_finished
        )
    _prefill(model, inputs, held)
    held.batch_repeat_interleave(max(beams, num_branches))
    return model.generate(**arguments)


def _beams(model: Any, generate_kwargs: Mapping[str, Any]) -> int:
    given = generate_kwargs.get("num_beams")
    if given is None:
        config = generate_kwargs.get("generation_config") or model.generation_config
        given = config.num_beams
    return given or 1


def _prefill(model: Any, inputs: Mapping[str, torch.Tensor], cache: SharedBranchCache) -> None:
    """Read all of each prompt but its last token, which generate will read."""
    ids = inputs["input_ids"][:, :-1]
    if not ids.shape[1]:
        return
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask[:, :-1]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        **cache_kwarg(cache),
        use_cache=True,
        logits_to_keep=1,
    )
