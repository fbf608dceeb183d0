"""One machine that serves requests with one cache: what fits, and how long its steps take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates
from transformers import Cache, PretrainedConfig

from hf_reasoncache.planning import Device, ModelSize, RowWork, prompt_seconds, row_bytes

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
Lengths = Whole | Sequence[int]

_ROUND = 64  # lengths are rounded up to this before bytes are computed: few different ones
_POINTS = 33  # lengths of a prompt, and of an answer, at which the work of a row is computed


class Timing(Protocol):
    """How long things take, given how much they are."""

    def step(self, rows: int, moved: float, flops: float) -> float:
        """Seconds of a decoding step: rows, bytes of keys and values, operations of attention."""

    def prompts(self, prompt: int, rows: int) -> float:
        """Seconds of reading prompts of so many tokens in so many rows at once."""


@dataclass(frozen=True)
class Ceiling:
    """The least time that a device allows, made longer by what is known to be lost.

    Attributes
    ----------
    size : ModelSize
    device : Device
    config : PretrainedConfig
    efficiency : float
        Share of the device's limits that is reached.
    overhead : float
        Seconds that every forward takes besides.
    """

    size: ModelSize
    device: Device
    config: PretrainedConfig
    efficiency: float = 1.0
    overhead: float = 0.0

    def step(self, rows: int, moved: float, flops: float) -> float:
        """See `Timing.step`."""
        memory = (self.size.read_bytes(rows) + moved) / self.device.bandwidth
        compute = (2 * self.size.active * rows + flops) / self.device.flops
        return self.overhead + max(memory, compute) / self.efficiency

    def prompts(self, prompt: int, rows: int) -> float:
        """See `Timing.prompts`."""
        least = prompt_seconds(self.size, self.device, self.config, prompt, rows)
        return self.overhead + least / self.efficiency


@dataclass(eq=False)
class Server:
    """A machine with one cache.

    Attributes
    ----------
    name : str
    cache : Cache
        A new one with the settings in question.
    config : PretrainedConfig
    size : ModelSize
    room : int
        Bytes for rows and their activations.
    timing : Timing
    longest : tuple of int
        The longest prompt and the longest answer that may come.
    branches : int
        Rows of each request.
    """

    name: str
    cache: Cache
    config: PretrainedConfig
    size: ModelSize
    room: int
    timing: Timing
    longest: tuple[int, int]
    branches: int = 1

    def __post_init__(self) -> None:
        self._needed: dict[tuple[int, int], int] = {}
        self._reading: dict[tuple[int, int], float] = {}

    @cached_property
    def shares(self) -> bool:
        """Whether the branches of a request share the memory of their prompt."""
        return self.work(1, 1).shared > 0

    def work(self, prompt: int, generated: int) -> RowWork:
        """What a step does for a row."""
        return RowWork.of(
            self.cache, self.config, prompt=prompt, generated=generated, dtype=self.size.dtype
        )

    def needed(self, prompt: int, answer: int) -> int:
        """Bytes for a request whose answers may have so many tokens, activations included."""
        prompt, answer = (-(-x // _ROUND) * _ROUND for x in (prompt, answer))
        # A budget must hold the prompt as it is, not as it is rounded.
        prompt = min(prompt, self.longest[0])
        if (prompt, answer) not in self._needed:
            row = row_bytes(
                self.cache, self.config, prompt=prompt, generated=answer, dtype=self.size.dtype
            )
            # The prompt is read once, before its branches part.
            activations = self.size.activation_bytes(prompt, self.branches)
            self._needed[prompt, answer] = row.most(self.branches) + activations
        return self._needed[prompt, answer]

    def capacity(self, limit: int) -> int:
        """Rows that fit if every request is as long as may be."""
        return self.branches * (self.room // self.needed(self.longest[0], limit))

    def prompt_seconds(self, prompt: int, requests: int = 1) -> float:
        """Seconds until the prompts of some requests have been read, padded to one length."""
        if (prompt, requests) not in self._reading:
            self._reading[prompt, requests] = self.timing.prompts(prompt, requests)
        return self._reading[prompt, requests]

    def moved(self, prompts: Lengths, generated: Lengths) -> tuple[float, float]:
        """Bytes of keys and values, and operations of attention, of some rows in one step; without
        what branches share.
        """
        tables, spacing = self._tables
        # Places in the tables, whose first entry is for one token.
        places = (np.array([prompts, generated]) - 1) / spacing
        moved, flops = (map_coordinates(table, places, order=1).sum() for table in tables)
        return float(moved), float(flops)

    def step_seconds(
        self, prompts: Lengths, generated: Lengths, requests: Sequence[int], copies: int = 1
    ) -> float:
        """Seconds of a step.

        Parameters
        ----------
        prompts, generated : integers, one of each per row
            Tokens of the row's prompt, and tokens written already.
        requests : sequence of int
            Prompts of the requests that these rows belong to, each once; of interest where branches
            share theirs.
        copies : int
            Rows that are like each of these.
        """
        moved, flops = self.moved(prompts, generated)
        shared = self._shared_token * sum(requests)
        return self.timing.step(copies * len(prompts), copies * moved + shared, copies * flops)

    @cached_property
    def _shared_token(self) -> float:
        return self.work(1, 1).shared

    @cached_property
    def _tables(self) -> tuple[Floats, Floats]:
        """Bytes and operations of a row `[2, P, A]`, by the tokens of prompt and answer, and how
        many tokens `[2, 1]` lie between two entries.
        """
        spacing = [max(1, -(-(longest - 1) // (_POINTS - 1))) for longest in self.longest]
        counts = [
            2 + (longest - 2) // step for longest, step in zip(self.longest, spacing, strict=True)
        ]
        tables = np.empty((2, *counts))
        for prompt, generated in np.ndindex(*counts):
            work = self.work(
                # The last entry may lie beyond what comes, and beyond what a budget can hold.
                min(1 + prompt * spacing[0], self.longest[0]),
                min(1 + generated * spacing[1], self.longest[1]),
            )
            tables[:, prompt, generated] = work.own, work.flops
        return tables, np.array(spacing, dtype=float)[:, None]
