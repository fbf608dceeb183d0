"""Which rows of a batch have the same prompt.

A cache sees keys and values, not tokens. generate repeats a prompt for every sequence to return,
and copies of a prompt have the same keys and values up to rounding: kernels may treat the first and
the last rows of a batch differently (we saw differences of a few units in the last place on two
threads). Different tokens differ by much more than that.
"""

from __future__ import annotations

import torch

from hf_reasoncache.layers.chunk import Chunk
from hf_reasoncache.shards import Shard


class Twins:
    """Finds rows with the same tokens, once per forward for all layers of a cache.

    The first layer that asks decides, where rounding has had least occasion to grow.
    """

    def __init__(self) -> None:
        self._layer: int | None = None
        self._first_like: torch.Tensor = torch.zeros(0, dtype=torch.long, device="cpu")

    def of(self, chunk: Chunk, layer: int, groups: torch.Tensor, shard: Shard) -> torch.Tensor:
        """Return for each row the first row that brings the same tokens.

        Parameters
        ----------
        chunk : Chunk
        layer : int
            Index of the layer that asks; the lowest one decides for all.
        groups : LongTensor[B]
            Rows that differ here are different already.
        shard : Shard
            Heads in other processes must be alike too.

        Returns
        -------
        LongTensor[B]
            On the CPU.
        """
        if self._layer is None or layer <= self._layer:
            found = shard.gather(_first_like(chunk, groups)[:, None])
            same = (found[:, None] == found).all(-1)
            self._layer, self._first_like = layer, same.int().argmax(-1)
        return self._first_like


def _first_like(chunk: Chunk, groups: torch.Tensor) -> torch.Tensor:
    found = list(range(len(groups)))
    firsts: list[int] = []
    for row in found:
        # Copies of a prompt are neighbours as a rule.
        for first in reversed(firsts):
            if groups[first] == groups[row] and _same_tokens(chunk, first, row):
                found[row] = first
                break
        else:
            firsts.append(row)
    return torch.tensor(found, device="cpu")


def _same_tokens(chunk: Chunk, one: int, other: int) -> bool:
    keys, values = chunk.keys, chunk.values
    if chunk.valid is not None:
        if not torch.equal(chunk.valid[one], chunk.valid[other]):
            return False
        keys, values = (x[[one, other]][:, :, chunk.valid[one]] for x in (keys, values))
        one, other = 0, 1
    return _close(keys[one], keys[other]) and _close(values[one], values[other])


def _close(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether all vectors are equal up to rounding."""
    # Between a few units in the last place and the O(1) of another token.
    tolerance = torch.finfo(x.dtype).eps ** 0.5
    scale = x.abs().amax(-1, keepdim=True)
    return bool(((x - y).abs() <= tolerance * scale).all())
