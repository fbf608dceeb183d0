"""Answers a batch of prompts with one cache, and records what it held for each of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.protection import Spans
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.report import storage_bytes


@dataclass(frozen=True)
class Answer:
    """One row of a batch.

    Attributes
    ----------
    tokens : tuple of int
        What was generated, without the end token and what follows it.
    finished : bool
        Whether it ended with an end token.
    held : float
        Tokens held per KV head, on average over the steps, layers and heads; NaN if the
        answer ended before the first sample.
    mean_bytes : float
        Bytes of all the cache's storages per row of the batch, on average over the same steps.
    keep_rates : tuple of tuple of float
        For each layer and span, the share of its tokens held, on average over the same steps.
    """

    tokens: tuple[int, ...]
    finished: bool
    held: float
    mean_bytes: float
    keep_rates: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Batch:
    """Answers that were generated together.

    Attributes
    ----------
    answers : tuple of Answer
    seconds : float
        Time in `generate`.
    final_bytes : int
        Bytes of all the cache's storages at the end.
    evicted : int
        Tokens evicted, all rows, layers and heads counted.
    """

    answers: tuple[Answer, ...]
    seconds: float
    final_bytes: int
    evicted: int


@torch.inference_mode()
def answer_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    cache: Cache,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    spans: Spans | None = None,
    sampling: int = 16,
) -> Batch:
    """Generate one answer to each prompt.

    Parameters
    ----------
    model : PreTrainedModel
        With the attention implementation that the cache needs.
    prompts : sequence of sequences of int
        Token ids; padded on the left here.
    cache : Cache
        A new one.
    max_new_tokens : int
    temperature : float
        0 is greedy; otherwise the model's generation config has the other settings of sampling.
    seed : int
        Of the sampling.
    spans : Spans, optional
        Spans whose keep rates are recorded, with a `ReasonCache`.
    sampling : int
        Steps between two samples of what the cache holds.
    """
    ends = _ends(model)
    longest = max(map(len, prompts))
    pad = model.generation_config.pad_token_id
    pad = pad if isinstance(pad, int) else min(ends, default=0)
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    ids, mask = ids.to(model.device), mask.to(model.device)
    sampler = _Sampler(cache, mask, spans, sampling)
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    if temperature == 0:
        how = dict.fromkeys(("temperature", "top_p", "top_k")) | {"do_sample": False}
    watch = model.register_forward_hook(sampler)
    begin = time.perf_counter()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                **cache_kwarg(cache),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                **how,
            )
    finally:
        watch.remove()
    seconds = time.perf_counter() - begin
    answers = []
    for row, generated in enumerate(output[:, longest:].tolist()):
        length = next((n for n, token in enumerate(generated) if token in ends), None)
        tokens = tuple(generated[:length])
        answers.append(Answer(tokens, length is not None, *sampler.means(row, len(tokens))))
    evicted = cache.report().evicted if isinstance(cache, ReasonCache) else 0
    return Batch(tuple(answers), seconds, cache_bytes(cache), evicted)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all storages that a cache holds."""
    if isinstance(cache, ReasonCache):
        return cache.report().total_bytes
    return sum(storage_bytes(layer) for layer in cache.layers)


def _ends(model: PreTrainedModel) -> set[int]:
    value = model.generation_config.eos_token_id
    return set(value) if isinstance(value, list) else set() if value is None else {value}


class _Sampler:
    """A forward hook that records what a cache holds for each row."""

    def __init__(self, cache: Cache, mask: torch.Tensor, spans: Spans | None, every: int) -> None:
        self.cache, self.mask, self.every = cache, mask, every
        self.spans = spans if isinstance(cache, ReasonCache) else None
        self.samples: list[tuple[int, torch.Tensor, float, torch.Tensor | None]] = []

    def __call__(self, *_: object) -> None:
        columns = self.cache.get_seq_length()
        step = columns - self.mask.shape[1]
        if columns % self.every:
            return
        rates = None
        if isinstance(self.cache, ReasonCache):
            layers = self.cache.report().layers
            held = torch.tensor([layer.held for layer in layers]).float().mean((0, 2))
            # Not right after the prompt: nothing is evicted before the next step.
            if self.spans is not None and step:
                rates = self.cache.keep_rates(self.spans)
        else:
            held = columns - (1 - self.mask).sum(-1).float()
        size = cache_bytes(self.cache) / len(self.mask)
        self.samples.append((step, held, size, rates))

    def means(self, row: int, length: int) -> tuple[float, float, tuple[tuple[float, ...], ...]]:
        """Tokens, bytes and keep rates on average over the steps of an answer."""
        found = [sample for sample in self.samples if sample[0] <= length]
        if not found:
            return float("nan"), float("nan"), ()
        rates = [each[3][:, row] for each in found if each[3] is not None]
        kept = torch.stack(rates).mean(0).tolist() if rates else []
        return (
            statistics.mean(float(held[row]) for _, held, _, _ in found),
            statistics.mean(size for _, _, size, _ in found),
            tuple(tuple(rate for rate in layer if rate == rate) for layer in kept),
        )
