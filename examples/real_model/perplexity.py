"""Texts whose loss is measured on pretrained weights: pages that every Python has on board."""

from __future__ import annotations

import pydoc_data.topics

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from hf_reasoncache.evaluation.fidelity import BLOCK, forwards
from hf_reasoncache.evaluation.statistics import Estimate

TOPICS = ("compound", "execmodel", "formatstrings", "specialnames", "types", "typesseq")


def texts(tokenizer: Tokenizer, tokens: int) -> torch.Tensor:
    """LongTensor[texts, tokens]: the beginnings of the pages."""
    pages = pydoc_data.topics.topics
    ids = [tokenizer(pages[name])["input_ids"][:tokens] for name in TOPICS]
    short = [name for name, row in zip(TOPICS, ids, strict=True) if len(row) < tokens]
    if short:
        raise SystemExit(f"error: expected pages of {tokens} tokens, got shorter ones: {short}")
    return torch.tensor(ids)


def full_forwards(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return `forwards` of transformers' own cache; the attention is set back afterwards."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        return list(forwards(model, ids, DynamicCache(config=model.config)))
    finally:
        model.set_attn_implementation(attention)


def difference(found: torch.Tensor, first: torch.Tensor) -> str:
    """Mean difference of the loss over whole blocks of tokens, and its 95% interval."""
    apart = (found - first)[:, : found.shape[1] // BLOCK * BLOCK]
    sums = apart.unflatten(1, (-1, BLOCK)).sum(-1).flatten().tolist()
    return str(Estimate.of_blocks(sums, [BLOCK] * len(sums)))
