"""Shows the tokens of a generation to a cache, which sees keys and values only."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from hf_reasoncache.experimental.steps import Boundaries, Step, StepSegmenter


class Shared(Protocol):
    """What the watcher asks of a cache; see `StepShareCache`."""

    tokenizer: PreTrainedTokenizerBase
    boundaries: Boundaries
    branches: int

    def begin(self, rows: int) -> None:
        """Prepare for that many rows."""

    def seal_prompt(self, row: int, end: int, like: int) -> None:
        """Turn a prompt into a block, or point at that of an earlier row with the same prompt."""

    def seal(self, row: int, step: Step) -> None:
        """Turn a step, the oldest tokens that are in no block, into blocks."""


class StepWatcher(StoppingCriteria):
    """A stopping criterion that cuts rows into steps for a `StepShareCache`; it stops nothing."""

    def __init__(self, cache: Shared) -> None:
        self._cache = cache
        self.reset()

    def reset(self) -> None:
        """Get ready for another generation."""
        self._length = 0
        self._segmenters: list[StepSegmenter] = []
        self._ended: dict[int, Step] = {}
        self._unseen = 0

    def expect(self, cached: int, new: int) -> None:
        """Raise ValueError if tokens are cached that were never shown."""
        started = bool(self._segmenters)
        # A prompt may end in one token that is read alone, but not in two.
        self._unseen += new == 1 and not started
        if self._unseen > 1 or (started and (cached, new) != (self._length - 1, 1)):
            raise ValueError(
                f"StepShareCache: expected the tokens after column {self._length} one at a time, "
                f"got {new} after {cached}; pass stopping_criteria=[cache.watcher] to generate, "
                "and reset() the cache before another one."
            )

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Take the newest token of every row; its keys come with the next forward.

        Parameters
        ----------
        input_ids : LongTensor[B, T]

        Returns
        -------
        BoolTensor[B]
            All False.
        """
        cache, rows, length = self._cache, *input_ids.shape
        if not self._segmenters:
            if rows % cache.branches:
                raise ValueError(
                    f"expected {cache.branches} rows per problem, got a batch of {rows}; set "
                    "branches to num_return_sequences."
                )
            cache.begin(rows)
            self._segmenters = [
                StepSegmenter(cache.tokenizer, cache.boundaries, length - 1) for _ in range(rows)
            ]
            first: dict[tuple[int, ...], int] = {}
            for row, ids in enumerate(input_ids[:, :-1].tolist()):
                like = first.setdefault((row // cache.branches, *ids), row)
                cache.seal_prompt(row, length - 1, like)
        for row, step in self._ended.items():
            cache.seal(row, step)
        self._length = length
        newest = [
            s.push(token)
            for s, token in zip(self._segmenters, input_ids[:, -1].tolist(), strict=True)
        ]
        self._ended = {row: step for row, step in enumerate(newest) if step is not None}
        none: Any = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        return none
