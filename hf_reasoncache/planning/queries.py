"""How many columns' queries a layer keeps for scoring."""

from __future__ import annotations

from dataclasses import dataclass

from hf_reasoncache.layers.budgeted import BudgetedLayer
from hf_reasoncache.layers.evicting import EvictingLayer


@dataclass(frozen=True)
class KeptQueries:
    """The queries of one row in one layer, when tokens come one by one.

    Attributes
    ----------
    size : int
        Newest columns that an eviction asks about.
    prompt : int
        Columns before the single tokens.
    free, buffer : int or None
        Tokens for which there is room behind the prompt, and behind an eviction; None keeps the
        queries of every token, however far the next eviction is.
    """

    size: int
    prompt: int
    free: int | None = None
    buffer: int | None = None

    @staticmethod
    def of(layer: EvictingLayer, prompt: int, slots: int, elsewhere: int) -> KeptQueries:
        """Describe a layer with so many slots per head; `elsewhere` tokens are not in them."""
        if not isinstance(layer, BudgetedLayer):
            return KeptQueries(layer.query_columns, prompt)
        buffer, held = layer.policy.buffer, prompt - elsewhere
        free = slots - held if held <= slots else buffer
        return KeptQueries(layer.query_columns, prompt, free, buffer)

    def after(self, generated: int) -> int:
        """Columns kept after so many single tokens."""
        # A prompt's go at once, when there are as many newer ones.
        always = self.size if generated >= self.size else min(self.prompt, self.size) + generated
        if self.free is None or self.buffer is None:
            return always
        # The first token, and later every one that evicts, is kept beside what there is.
        steps, place = self.free, generated
        if generated > self.free:
            steps, place = self.buffer, (generated - self.free - 1) % self.buffer + 1
        if place <= 1 or steps - 1 <= self.size:
            return always
        return max(0, self.size - (steps - place))

    def most(self, generated: int) -> int:
        """Most columns kept after any of so many single tokens."""
        if self.free is None:
            return self.after(generated)
        moments = (1, max(self.size - 1, 0), self.free + 1, generated)
        return max(self.after(min(generated, moment)) for moment in moments)
