"""Answers one batch of jobs with one cache, and records what it took."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from hf_reasoncache.branching.prefill_once import prefill_once
from hf_reasoncache.evaluation.spans import spans_of
from hf_reasoncache.evaluation.specs import Budget, CacheSpec
from hf_reasoncache.generation.lines import Completion, Line
from hf_reasoncache.generation.packing import Job
from hf_reasoncache.generation.sampling import OwnStreams, RowLimits, stream_seed
from hf_reasoncache.planning import row_bytes
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.report import storage_bytes

SEED = 0
"""Of a random scorer: which tokens it evicts."""


@dataclass(frozen=True)
class Made:
    """One batch.

    Attributes
    ----------
    completions : tuple of Completion
    seconds, cpu_seconds : float
        In generate: of the clock, and of the processors.
    peak_bytes : int
        Most that the cache held after a step.
    live : tuple of int
        Rows in the model at each step.
    """

    completions: tuple[Completion, ...]
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    live: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return sum(each.completion_tokens for each in self.completions)


class Worker:
    """Answers batches, each with a new cache.

    A prompt is read once for all its samples in a batch, and rows that have ended leave the batch.
    Where the cache never evicts prompts, samples also share the memory of theirs.

    Parameters
    ----------
    model, tokenizer
    spec : CacheSpec
    budget : int, float or None
    samples : int
        Of a line; with more than one, prompts are shared.
    chat : bool
    token_ids : bool
        Whether completions get theirs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: CacheSpec,
        budget: Budget | None,
        *,
        samples: int,
        chat: bool,
        token_ids: bool,
    ) -> None:
        self.model, self.tokenizer, self.spec, self.budget = model, tokenizer, spec, budget
        self.chat, self.token_ids = chat, token_ids
        self.shares = samples > 1 and spec.keeps_prompt
        model.set_attn_implementation("reasoncache" if self.shares else spec.attention)
        ends = model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends} - {None}
        pad = model.generation_config.pad_token_id
        self.pad = pad if isinstance(pad, int) else min(self.ends, default=0)
        self.row_bytes = lru_cache(maxsize=None)(self._row_bytes)

    def check(self, lines: Sequence[Line]) -> None:
        """Refuse lines whose spans the cache could not protect; raises ValueError."""
        if self.spec.whitelist or self.spec.fair is not None:
            if not any(line.question.spans for line in lines):
                raise ValueError(
                    f"{self.spec.name}: expected lines with 'spans' to protect, got none."
                )
            spans_of([line.question for line in lines], self.tokenizer, chat=self.chat)
        spans: dict[tuple[int, ...], Line] = {}
        for line in lines:
            # Equal prompts are read as one.
            other = spans.setdefault(line.ids, line)
            if other.question.spans != line.question.spans:
                raise ValueError(
                    f"{line.place}: expected the spans of {other.place}, which has the same "
                    "prompt, got others; make them equal."
                )

    def _row_bytes(self, prompt: int, new: int, rows: int) -> int:
        """Most bytes of a prompt that so many rows continue; see `packing.RowBytes`."""
        spec = self.spec
        if not spec.keeps_prompt:
            # What is protected of a prompt lies inside the budget and changes no size.
            settings = spec.settings | {"protect": False}
            spec = replace(spec, whitelist=False, fair=None, settings=settings)
        cache = self._cache(spec, new)
        config, dtype = self.model.config, self.model.dtype
        # The last token of an answer is never fed.
        found = row_bytes(cache, config, prompt=prompt, generated=new - 1, dtype=dtype)
        return found.most(rows)

    def _cache(self, spec: CacheSpec, new: int, spans: Any = None) -> Cache:
        config = self.model.config
        if not self.shares:
            return spec.make(config, self.budget, spans, SEED)
        cache = spec.make_shared(config, self.budget, SEED)
        cache.reserve(new)
        return cache

    @torch.inference_mode()
    def run(self, batch: Sequence[Job], progress: Callable[[int], None]) -> Made:
        """Answer a batch.

        Parameters
        ----------
        batch : sequence of Job
            Of one sampling.
        progress : Callable[[int], None]
            Told at each step how many rows the model has just run.
        """
        lines = [job.line for job in batch for _ in job.samples]
        samples = [sample for job in batch for sample in job.samples]
        limits = [line.max_new_tokens for line in lines]
        longest = max(len(line.ids) for line in lines)
        ids = torch.full((len(lines), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, line in enumerate(lines):
            ids[row, longest - len(line.ids) :] = torch.tensor(line.ids)
            mask[row, longest - len(line.ids) :] = 1
        # The rows that are read: equal prompts are one.
        read = list({line.ids: line.question for line in lines}.values())
        cache = self._cache(self.spec, max(limits), spans_of(read, self.tokenizer, chat=self.chat))
        watch = _Watch(cache, progress)
        hook = self.model.register_forward_hook(watch)
        begin, cpu = time.perf_counter(), time.process_time()
        try:
            output = self.model.generate(  # type: ignore[operator]
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                **cache_kwarg(cache),
                generation_config=self._generation(max(limits)),
                logits_processor=self._processors(lines, samples, limits),
                stopping_criteria=[RowLimits(longest, limits)],
                custom_generate=prefill_once,
            )
        finally:
            hook.remove()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        rows = zip(lines, samples, limits, output[:, longest:].tolist(), strict=True)
        completions = tuple(self._completion(*row) for row in rows)
        return Made(completions, seconds, cpu_seconds, watch.peak, tuple(watch.live))

    def _generation(self, new: int) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens, config.max_length = new, None
        config.num_beams = config.num_return_sequences = 1
        config.return_dict_in_generate = False
        # Tokens are drawn by `OwnStreams`.
        config.do_sample = False
        config.temperature = config.top_k = config.top_p = None
        config.pad_token_id = self.pad
        return config

    def _processors(
        self, lines: Sequence[Line], samples: Sequence[int], limits: Sequence[int]
    ) -> list[Any]:
        sampling = lines[0].sampling
        if sampling.temperature == 0:
            return []
        pairs = zip(lines, samples, strict=True)
        seeds = [stream_seed(line.seed, line.id, sample) for line, sample in pairs]
        return [OwnStreams(seeds, max(limits), sampling)]

    def _completion(self, line: Line, sample: int, limit: int, generated: list[int]) -> Completion:
        end = next((n for n, token in enumerate(generated[:limit]) if token in self.ends), None)
        text = generated[:limit] if end is None else generated[:end]
        tokens = generated[:limit] if end is None else generated[: end + 1]
        return Completion(
            id=line.id,
            sample=sample,
            seed=line.seed,
            text=str(self.tokenizer.decode(text)),
            prompt_tokens=len(line.ids),
            completion_tokens=len(tokens),
            finish_reason="length" if end is None else "stop",
            token_ids=tokens if self.token_ids else None,
        )


class _Watch:
    """A forward hook that records bytes and rows of each step."""

    def __init__(self, cache: Cache, progress: Callable[[int], None]) -> None:
        self.cache, self.progress = cache, progress
        self.peak, self.live = 0, list[int]()

    def __call__(self, module: Any, inputs: Any, output: Any) -> None:
        held = sum(getattr(x, "nbytes", None) or storage_bytes(x) for x in self.cache.layers)
        self.peak = max(self.peak, held)
        self.live.append(len(output.logits))
        self.progress(len(output.logits))
