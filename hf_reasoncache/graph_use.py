"""What became of the decode steps of a cache: from a CUDA graph or not, and why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hf_reasoncache.messages import shown

GraphMode = Literal["auto", "off"]


@dataclass
class GraphUse:
    """Steps of one token per row, since the cache was new.

    Attributes
    ----------
    recorded, replayed, eager : int
        Steps that were recorded, repeated, and run without a graph although graphs are on.
    reason : str or None
        Why the last step that ran without a graph did so; None where it only went ahead of a
        recording.
    """

    recorded: int = 0
    replayed: int = 0
    eager: int = 0
    reason: str | None = None

    def run_without(self, reason: str | None = None) -> None:
        """Count a step that runs without a graph."""
        self.eager += 1
        self.reason = reason

    def __str__(self) -> str:
        """Format in one phrase."""
        counts = f"recorded {self.recorded}, replayed {self.replayed}, eager {self.eager}"
        return counts if self.reason is None else f"{counts} ({self.reason})"


def require_graph_mode(mode: str) -> GraphMode:
    """Return the mode; ValueError for another word."""
    for known in get_args(GraphMode):
        if mode == known:
            return known
    raise ValueError(f'graphs: expected "auto" or "off", got {shown(mode)}.')
