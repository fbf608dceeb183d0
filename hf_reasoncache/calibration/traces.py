"""What a model writes with the full cache: the texts that every measurement reads again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_reasoncache.arguments import require_int, require_temperature
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.releases import cache_kwarg


@dataclass(frozen=True)
class Trace:
    """One prompt and what the model wrote after it, as token ids.

    Attributes
    ----------
    prompt : tuple of int
    completion : tuple of int
        Up to and including the end-of-sequence token, if there is one.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @staticmethod
    def longest(prompts: Sequence[int], most: int) -> list[Trace]:
        """Return what there can be of prompts of so many tokens at most, for bounds of costs."""
        return [Trace((0,) * prompt, (0,) * most) for prompt in prompts]

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class TraceSettings:
    """How traces are generated.

    Attributes
    ----------
    max_new_tokens : int
        Longest completion.
    batch_size : int
        Prompts generated together. A batch is a fixed run of neighbouring prompts, whatever the
        number of processes, because a sum over a padded batch may round differently.
    temperature : float or None
        0 is greedy; None samples as the model's own generation config says.
    seed : int
        Of the sampling; every batch has a stream of its own.
    """

    max_new_tokens: int = 4096
    batch_size: int = 8
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 2), ("batch_size", 1), ("seed", 0)):
            require_int(name, getattr(self, name), low=low)
        if self.temperature is not None:
            require_temperature(self.temperature)


@torch.inference_mode()
def generate_traces(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: TraceSettings,
    *,
    stream: int = 0,
) -> list[Trace]:
    """Complete prompts with the full cache, as one left-padded batch.

    Parameters
    ----------
    model : PreTrainedModel
        Runs the "reasoncache" attention.
    prompts : sequence of token ids
    settings : TraceSettings
    stream : int
        Which random numbers of the seed are used: the index of the batch.

    Returns
    -------
    list of Trace
        In the order of the prompts.
    """
    generation = GenerationConfig.from_dict(model.generation_config.to_dict())
    generation.max_new_tokens, generation.max_length = settings.max_new_tokens, None
    # A model's own config may ask for more than one trace per prompt.
    generation.num_beams = generation.num_return_sequences = 1
    generation.return_dict_in_generate = False
    if settings.temperature is not None:
        generation.do_sample = settings.temperature > 0
        generation.temperature = settings.temperature or 1.0
    ends = generation.eos_token_id
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    if generation.pad_token_id is None:
        generation.pad_token_id = min(ends, default=0)

    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), generation.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    cache = ReasonCache(model.config, lambda index, rank, layers: CacheLayer(index))
    with torch.random.fork_rng():
        torch.manual_seed((settings.seed << 20) + stream)
        output = model.generate(  # type: ignore[operator]
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            **cache_kwarg(cache),
            generation_config=generation,
        )
    completions = output[:, longest:].tolist()
    return [
        Trace(tuple(prompt), _until_end(completion, ends))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _until_end(completion: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    stop = next((place for place, token in enumerate(completion) if token in ends), None)
    return tuple(completion if stop is None else completion[: stop + 1])
