"""Sampling in which every row draws from a stream of its own, whatever else is in its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_OTHERS = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes
    ----------
    temperature : float
        0 is greedy.
    top_k : int or None
        Draw among so many of the likeliest tokens.
    top_p : float or None
        Draw among the likeliest tokens that together have this probability.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    temperature: float
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name, expected, fits in (
            ("temperature", "0 to 10", _number(self.temperature) and 0 <= self.temperature <= 10),
            ("top_k", "1 or more", self.top_k is None or _whole(self.top_k)),
            ("top_p", "above 0, up to 1", self.top_p is None or _share(self.top_p)),
        ):
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}.")

    @staticmethod
    def of(config: GenerationConfig) -> Sampling:
        """Return what a model's generation config says.

        Raises
        ------
        ValueError
            If it samples in a way that is not known here.
        """
        if not config.do_sample:
            return Sampling(0.0)
        for name in _OTHERS:
            if getattr(config, name, None) is not None:
                raise ValueError(
                    f"{name}: expected a generation config with temperature, top_k and top_p, got "
                    f"{name}={getattr(config, name)!r}; pass --temperature to leave it out."
                )
        temperature = 1.0 if config.temperature is None else config.temperature
        return Sampling(temperature, config.top_k or None, config.top_p)

    def changed(self, **given: Any) -> Sampling:
        """Return these settings with those that are given and not None."""
        return replace(self, **{name: x for name, x in given.items() if x is not None})

    def warpers(self) -> LogitsProcessorList:
        """What generate does to logits before it draws, in its order."""
        found = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            found.append(TopPLogitsWarper(float(self.top_p)))
        return found


def stream_seed(seed: int, name: str, sample: int) -> int:
    """Return the seed of the stream that one sample of one prompt draws from."""
    text = f"{seed}/{sample}/{name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class OwnStreams(LogitsProcessor):
    """Draws the token of each row, and rules out all others.

    Token `t` of a row is where its cumulative distribution passes number `t` of the row's stream.
    So a row draws the same tokens in any batch, on any device, up to the rounding of the logits.

    Parameters
    ----------
    seeds : sequence of int
        Of each row's stream.
    steps : int
        Tokens that a row may write.
    sampling : Sampling
    """

    def __init__(self, seeds: Sequence[int], steps: int, sampling: Sampling) -> None:
        self.warpers = sampling.warpers()
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        # [steps, rows], float64 as the sums below; from the CPU, whatever the model runs on.
        self.numbers = torch.stack(
            [torch.rand(steps, generator=stream, dtype=torch.float64) for stream in streams], dim=1
        )
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """Return minus infinity for all tokens but the one that is drawn, in each row."""
        warped = self.warpers(input_ids, scores)
        mass = warped.double().softmax(-1).cumsum(-1)
        number = self.numbers[self.step, :, None].to(mass.device) * mass[:, -1:]
        self.step += 1
        chosen = torch.searchsorted(mass, number, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


class RowLimits(StoppingCriteria):
    """Ends each row at its own longest length.

    Parameters
    ----------
    columns : int
        Of the prompts, padding included.
    limits : sequence of int
        Tokens that each row may write.
    """

    def __init__(self, columns: int, limits: Sequence[int]) -> None:
        self.columns, self.limits = columns, torch.tensor(limits)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return which rows have written all their tokens."""
        return (self.limits <= input_ids.shape[1] - self.columns).to(input_ids.device)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return type(value) is int and value >= 1


def _share(value: object) -> bool:
    return isinstance(value, int | float) and _number(value) and 0 < value <= 1
