"""Branches that are put aside, and which of their blocks go when memory is short.

A block is the segment of all layers at one place of a branch's path. What a live row reads is never
touched. Of the rest the block with the lowest `score / (depth + 1)` goes first (the rule of RSBCM
in RKSC, arXiv 2606.09937); ours is that only the end of a path can go, so that what is left of a
branch is still a text from its beginning, and that prompts, at depth 0, go last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hf_reasoncache.storage.segment import Path


@dataclass(eq=False)
class Parked:
    """A branch outside of the batch.

    Attributes
    ----------
    score : float
        What the branch is worth, >= 0.
    first : int
        Column of its first real token.
    end : int
        First column that is not stored: where reading must go on after a resumption. Falls when
        blocks go.
    """

    score: float
    first: int
    end: int
    _paths: list[Path]

    @property
    def tokens(self) -> int:
        """Tokens still stored, the prompt included."""
        return sum(part.tokens for part in self._paths[0])

    @property
    def paths(self) -> tuple[Path, ...]:
        """What is stored, layer by layer."""
        return tuple(self._paths)

    def drop_last(self) -> None:
        """Let the last block go."""
        self.end = int(self._paths[0][-1].columns[0])
        self._paths = [path[:-1] for path in self._paths]


class Parking:
    """All parked branches of a cache.

    Attributes
    ----------
    branches : list of Parked
    blocks_evicted : int
    """

    def __init__(self) -> None:
        self.branches: list[Parked] = []
        self.blocks_evicted = 0

    def evict_one(self, live: Sequence[Path]) -> bool:
        """Let the block go that is worth least; False if live rows need all that there is.

        Parameters
        ----------
        live : sequence of Path
            The first layer's paths of all rows in the batch.
        """
        needed = {part for path in live for part in path}
        inner = {part for each in self.branches for part in each.paths[0][:-1]}
        worth: dict[tuple[bool, float], list[Parked]] = {}
        for branch in self.branches:
            path = branch.paths[0]
            if path and path[-1] not in needed and path[-1] not in inner:
                sharing = [each for each in self.branches if path[-1] in each.paths[0]]
                score = max(each.score for each in sharing)
                worth[len(path) == 1, score / len(path)] = sharing
        if not worth:
            return False
        for branch in worth[min(worth)]:
            branch.drop_last()
        self.blocks_evicted += 1
        return True

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the keys and values of all blocks."""
        for branch in self.branches:
            for path in branch.paths:
                for part in path:
                    yield from part.fields.values()
