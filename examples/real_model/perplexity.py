"""Loss of real text, fed a few tokens at a time, as a cache sees it that evicts from all of it.

The texts are pages of Python's own documentation, which every Python has on board.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterable, Iterator

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from hf_reasoncache.releases import cache_kwarg

TOPICS = ("compound", "execmodel", "formatstrings", "specialnames", "types", "typesseq")
CHUNK = 8
"""Tokens per forward: evictions fall between two of them, as they do between single tokens."""

BLOCK = 64
"""Tokens that are resampled together: neighbours are not independent."""


def texts(tokenizer: Tokenizer, tokens: int) -> torch.Tensor:
    """LongTensor[texts, tokens]: the beginnings of the pages."""
    pages = pydoc_data.topics.topics
    ids = [tokenizer(pages[name])["input_ids"][:tokens] for name in TOPICS]
    short = [name for name, row in zip(TOPICS, ids, strict=True) if len(row) < tokens]
    if short:
        raise SystemExit(f"error: expected pages of {tokens} tokens, got shorter ones: {short}")
    return torch.tensor(ids)


@torch.inference_mode()
def forwards(model: PreTrainedModel, ids: torch.Tensor, cache: object) -> Iterator[torch.Tensor]:
    """Yield the logits `[texts, CHUNK, vocabulary]` of one chunk after the other."""
    for start in range(0, ids.shape[1], CHUNK):
        yield model(ids[:, start : start + CHUNK], **cache_kwarg(cache), use_cache=True).logits


def losses(ids: torch.Tensor, chunks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Tensor[texts, tokens - CHUNK]: loss of every token after the first chunk, in nats."""
    found = []
    for start, logits in zip(range(0, ids.shape[1], CHUNK), chunks, strict=True):
        after = ids[:, start + 1 : start + CHUNK + 1]
        logs = logits[:, : after.shape[1]].float().log_softmax(-1)
        found.append(-logs.gather(-1, after[..., None])[..., 0])
    return torch.cat(found, 1)[:, CHUNK - 1 :]


def full_forwards(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return `forwards` of transformers' own cache; the attention is set back afterwards."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        return list(forwards(model, ids, DynamicCache(config=model.config)))
    finally:
        model.set_attn_implementation(attention)


def difference(found: torch.Tensor, first: torch.Tensor) -> str:
    """Mean difference of the loss, and its 95% interval by resampling blocks of tokens."""
    apart = (found - first)[:, : found.shape[1] // BLOCK * BLOCK]
    blocks = apart.unflatten(1, (-1, BLOCK)).mean(-1).flatten()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(blocks), (5000, len(blocks)), generator=generator)
    low, high = blocks[drawn].mean(-1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{float(blocks.mean()):+.3f} ({low:+.3f}, {high:+.3f})"
