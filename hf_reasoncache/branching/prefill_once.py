"""Read each different prompt of a batch once, then decode all rows and drop the finished ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode

from hf_reasoncache.releases import CACHE_ARGUMENT, cache_kwarg, take_cache

_KNOWN = ("attention_mask", "position_ids", "use_cache", "logits_to_keep")


def prefill_once(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    drop_finished: bool = True,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Decode for `model.generate(custom_generate=prefill_once, num_return_sequences=N)`.

    generate repeats every prompt N times before the model reads it. Here it is read once, and the
    cache's row repeated. Tokens, processors, criteria and random numbers are those of generate
    itself: the same seed gives the same tokens.

    Parameters
    ----------
    model : PreTrainedModel
    input_ids : LongTensor[B, T]
        Prompts, already repeated.
    logits_processor, stopping_criteria, generation_config
        As generate prepares them. Processors and criteria see all rows at every step; for a row
        that was dropped, its last logits again.
    drop_finished : bool
        Whether rows that have ended leave the batch and the cache, so that they cost neither time
        nor memory. The cache then holds the rows that ended last, and cannot be used for another
        turn.
    **model_kwargs
        `cache` (`past_key_values`) is required: any cache whose rows can be selected, but only
        `SharedBranchCache` stores repeated rows once.

    Returns
    -------
    LongTensor[B, T + new] or GenerateDecoderOnlyOutput
        As generate; finished rows are filled up with `pad_token_id`.

    Raises
    ------
    ValueError
        For beams (use `branch_generate`) and assisted decoding, a cache that is not empty, inputs
        other than tokens, outputs of hidden states or attentions.

    Notes
    -----
    generate does not hand a `streamer` to custom functions.
    """
    cache = take_cache(model_kwargs)
    _check(generation_config, cache, model_kwargs)
    branches = _Branches(model, input_ids, cache, model_kwargs, generation_config)
    recorded = _Recorded(generation_config)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    pad = _pad_token(generation_config)
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    while True:
        logits = branches.logits.to(torch.float32, copy=True)
        # transformers annotates its own functions with LongTensor, which no operation returns.
        scores = logits_processor(cast(Any, branches.ids), cast(Any, logits))
        recorded.add(scores, logits)
        tokens = _choose(scores, generation_config.do_sample)
        if pads or drop_finished:
            # generate keeps sampling in rows that another criterion than a token has stopped; rows
            # that were dropped cannot.
            tokens = tokens.where(unfinished, pad if pad is not None else tokens)
        branches.append(tokens)
        stopped = stopping_criteria(cast(Any, branches.ids), cast(Any, recorded.scores))
        unfinished = unfinished & ~stopped.to(unfinished.device)
        if not bool(unfinished.any()):
            break
        if drop_finished:
            if pad is None and not bool(unfinished.all()):
                raise ValueError(
                    "pad_token_id: expected a token to fill finished rows with, got None; pass "
                    "pad_token_id, or drop_finished=False."
                )
            branches.keep(unfinished)
        branches.step()
    if not generation_config.return_dict_in_generate:
        return branches.ids
    return GenerateDecoderOnlyOutput(
        sequences=cast(Any, branches.ids),
        scores=cast(Any, recorded.scores),
        logits=cast(Any, recorded.logits),
        **cache_kwarg(branches.cache),
    )


class _Branches:
    """Rows being decoded.

    Attributes
    ----------
    ids : LongTensor[B, T]
        Tokens of all rows, finished ones included.
    logits : Tensor[B, V]
        The newest of each row.
    cache : Cache
        Holds the rows `live`.
    live : LongTensor[L]
    """

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        cache: Cache,
        inputs: dict[str, Any],
        config: GenerationConfig,
    ) -> None:
        self.model, self.ids, self.cache = model, ids, cache
        self.live = torch.arange(len(ids), device=ids.device)
        mask = inputs.get("attention_mask")
        self.mask = mask
        positions = inputs.get("position_ids")
        if positions is None:
            real = torch.ones_like(ids) if mask is None else mask
            positions = (real.cumsum(-1) - 1).clamp_min(0)
        self.positions: torch.Tensor = positions
        # Only the last logits are needed.
        self.extra = {name: inputs[name] for name in ("logits_to_keep",) if name in inputs}
        self._prefill(config.prefill_chunk_size or ids.shape[1])

    def _prefill(self, chunk: int) -> None:
        firsts, copies = _distinct_rows([self.ids, self.mask, self.positions])
        for start in range(0, self.ids.shape[1], chunk):
            part = slice(start, start + chunk)
            mask = None if self.mask is None else self.mask[firsts, : start + chunk]
            logits = self._forward(self.ids[firsts, part], mask, self.positions[firsts, part])
        if len(firsts) < len(self.ids):
            self.cache.batch_select_indices(copies)
        self.logits = logits[copies]
        self.positions = self.positions[:, -1:]

    def append(self, tokens: torch.Tensor) -> None:
        """Add a token to every row."""
        self.ids = torch.cat([self.ids, tokens[:, None].to(self.ids)], dim=-1)
        self.positions = self.positions + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=-1)

    def keep(self, unfinished: torch.Tensor) -> None:
        """Drop live rows that have finished."""
        still = unfinished[self.live]
        if not bool(still.all()):
            self.cache.batch_select_indices(still.nonzero()[:, 0])
            self.live = self.live[still]

    def step(self) -> None:
        """Run the model on the newest token of each live row."""
        mask = None if self.mask is None else self.mask[self.live]
        logits = self._forward(self.ids[self.live, -1:], mask, self.positions[self.live])
        self.logits[self.live] = logits

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **cache_kwarg(self.cache),
            use_cache=True,
            **self.extra,
        )
        return out.logits[:, -1]


@dataclass
class _Recorded:
    """Scores and logits of every step, as far as the config asks for them."""

    config: GenerationConfig
    scores: tuple[torch.Tensor, ...] | None = field(init=False)
    logits: tuple[torch.Tensor, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        wanted = self.config.return_dict_in_generate
        self.scores = () if wanted and self.config.output_scores else None
        self.logits = () if wanted and self.config.output_logits else None

    def add(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)


def _check(config: GenerationConfig, cache: Any, inputs: dict[str, Any]) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(
            f"prefill_once: expected greedy decoding or sampling, got {mode.value}; for beams, "
            "branch_generate(model, inputs, num_branches=..., num_beams=...) reads the prompt once."
        )
    if not isinstance(cache, Cache) or cache.get_seq_length() > 0:
        got = "a used cache" if isinstance(cache, Cache) else type(cache).__name__
        raise ValueError(
            f"prefill_once: expected {CACHE_ARGUMENT}=SharedBranchCache(model.config), new or "
            f"reset, got {got}; for another turn, call generate without custom_generate."
        )
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ValueError(
            "prefill_once: expected no output_attentions and no output_hidden_states, got one; "
            "rows that leave the batch have none."
        )
    unknown = [name for name, x in inputs.items() if name not in _KNOWN and x is not None]
    if unknown:
        raise ValueError(
            f"prefill_once: expected a prompt of tokens, got {', '.join(sorted(unknown))} as well; "
            "call generate without custom_generate."
        )


def _pad_token(config: GenerationConfig) -> int | None:
    """Return the token that fills finished rows, by the rule of generate."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = config.eos_token_id
    if isinstance(ends, Iterable):
        return next((int(token) for token in ends), None)
    return None if ends is None else int(ends)


def _choose(scores: torch.Tensor, do_sample: bool | None) -> torch.Tensor:
    if do_sample:
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
    return scores.argmax(-1)


def _distinct_rows(parts: Iterable[torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Group rows that are equal in all `parts`: first row of each group, group of each row."""
    given = [part for part in parts if part is not None]
    rows = zip(*(part.tolist() for part in given), strict=True)
    kinds: dict[tuple[tuple[int, ...], ...], int] = {}
    firsts, copies = [], []
    for index, row in enumerate(rows):
        key = tuple(map(tuple, row))
        if key not in kinds:
            kinds[key] = len(kinds)
            firsts.append(index)
        copies.append(kinds[key])
    device = given[0].device
    return torch.tensor(firsts, device=device), torch.tensor(copies, device=device)
