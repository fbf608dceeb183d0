"""How many rows fit a device, and how fast they can be, cache by cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from transformers import Cache, PretrainedConfig

from hf_reasoncache.planning.devices import Device
from hf_reasoncache.planning.model import ModelSize
from hf_reasoncache.planning.rows import RowBytes, row_bytes
from hf_reasoncache.planning.speed import RowWork, prompt_seconds, step_seconds
from hf_reasoncache.planning.units import amount

_SAMPLES = 32  # lengths at which a step is computed for the mean over an answer


@dataclass(frozen=True)
class Setting:
    """What is planned for.

    Attributes
    ----------
    config : PretrainedConfig
    size : ModelSize
    device : Device
    prompt, context : int
        Tokens of the prompt, and of prompt and answer.
    reserve : int
        Bytes that are left alone: the runtime, its libraries, and gaps between allocations.

    Raises
    ------
    ValueError
        If there is no room for an answer, or the device cannot hold the weights.
    """

    config: PretrainedConfig
    size: ModelSize
    device: Device
    prompt: int
    context: int
    reserve: int

    def __post_init__(self) -> None:
        """Check."""
        if not 1 <= self.prompt < self.context:
            raise ValueError(
                f"prompt: expected from 1 to {self.context - 1} tokens in a context of "
                f"{self.context}, got {self.prompt}."
            )
        if self.room <= 0:
            raise ValueError(
                f"memory: expected more than {amount(self.size.weight_bytes + self.reserve)} "
                f"(weights {amount(self.size.weight_bytes)}, reserve "
                f"{amount(self.reserve)}), got {amount(self.device.memory)}; take a larger "
                "device, or a smaller dtype or model."
            )

    @property
    def answer(self) -> int:
        """Tokens generated."""
        return self.context - self.prompt

    @property
    def room(self) -> int:
        """Bytes for rows and their activations."""
        return self.device.memory - self.size.weight_bytes - self.reserve


@dataclass(frozen=True)
class CachePlan:
    """One cache in one setting; everything is computed, nothing measured.

    Attributes
    ----------
    setting : Setting
    name : str
    cache : Cache
        A new one.
    branches : int
        Rows that continue one prompt.
    """

    setting: Setting
    name: str
    cache: Cache
    branches: int = 1

    @cached_property
    def row(self) -> RowBytes:
        """Bytes at the end of the context."""
        return self.row_at(self.setting.answer - 1)

    def row_at(self, generated: int) -> RowBytes:
        """Bytes after so many tokens of the answer."""
        here = self.setting
        return row_bytes(
            self.cache, here.config, prompt=here.prompt, generated=generated, dtype=here.size.dtype
        )

    @property
    def bytes_per_row(self) -> float:
        """Bytes held at the end of the context, what branches share divided among them."""
        return self.row.held(self.branches) / self.branches

    @cached_property
    def prompts(self) -> int:
        """Prompts that fit, each with its branches; 0 if not even one does."""
        here = self.setting
        together = 1 if self.row.shared else self.branches
        activations = here.size.activation_bytes(together * here.prompt, self.branches)
        return here.room // (self.row.most(self.branches) + activations)

    @property
    def rows(self) -> int:
        """Rows that fit."""
        return self.prompts * self.branches

    def tokens_per_second(self, rows: int) -> float | None:
        """Ceiling at the end of the context, all rows together.

        None if so many rows do not fit, or are no whole number of prompts.
        """
        if rows > self.rows or rows % self.branches or not rows:
            return None
        return rows / self._step(rows, self._last)

    def mean_tokens_per_second(self, rows: int) -> float | None:
        """Ceiling on average over prompt and answer; None as above."""
        if rows > self.rows or rows % self.branches or not rows:
            return None
        here = self.setting
        read = rows // self.branches if self.row.shared else rows
        seconds = prompt_seconds(here.size, here.device, here.config, here.prompt, read)
        seconds += here.answer * sum(self._step(rows, work) for work in self._works) / _SAMPLES
        return rows * here.answer / seconds

    def _step(self, rows: int, work: RowWork) -> float:
        here = self.setting
        prompts = rows // self.branches
        return step_seconds(here.size, here.device, [work], self.branches, prompts)

    @cached_property
    def _last(self) -> RowWork:
        return self._work(self.setting.answer)

    @cached_property
    def _works(self) -> list[RowWork]:
        answer = self.setting.answer
        return [self._work(round((i + 0.5) * answer / _SAMPLES)) for i in range(_SAMPLES)]

    def _work(self, generated: int) -> RowWork:
        here = self.setting
        return RowWork.of(
            self.cache, here.config, prompt=here.prompt, generated=generated, dtype=here.size.dtype
        )
