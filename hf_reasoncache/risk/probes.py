"""Which heads and steps are probed, where every token ever seen is kept to compare with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from numbers import Real

from hf_reasoncache.shards import ALONE, Shard


@dataclass(frozen=True)
class Probes:
    """Which heads and steps are probed; ours.

    Attributes
    ----------
    heads : float
        Share of the KV heads of the model that have a shadow, in (0, 1]; each is drawn by itself.
    interval : int
        One step in so many is probed, another one in every layer.
    seed : int

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    heads: float = 0.1
    interval: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Check."""
        number = isinstance(self.heads, Real) and not isinstance(self.heads, bool)
        if not number or not 0 < self.heads <= 1:
            raise ValueError(f"probes: expected heads as a number in (0, 1], got {self.heads!r}.")
        for name, low in (("interval", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"probes: expected {name} as an integer >= {low}, got {value!r}.")

    def draw(self, layer: int, heads: int, shard: Shard = ALONE) -> tuple[list[int], int]:
        """Draw which of a layer's KV heads have a shadow, of which `heads` are here, and a step.

        Which ones are does not depend on where heads are.

        Returns
        -------
        heads : list of int
            Counted among those that are here.
        phase : int
            Remainder of the steps that are probed, divided by `interval`.
        """
        drawn = random.Random(f"{self.seed}/{layer}")
        total = shard.total or heads
        chosen = [head for head in range(total) if drawn.random() < self.heads]
        phase = drawn.randrange(self.interval)
        return [head - shard.first for head in chosen if 0 <= head - shard.first < heads], phase
