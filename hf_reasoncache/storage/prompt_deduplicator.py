"""Which rows of a batch have the same prompt.

A cache sees keys and values, not tokens. In the first layer these depend on a token and its
position only, and copies of a prompt, as generate makes them for every sequence to return, get the
same ones: bit by bit in 16-bit types, since sums are kept in float32 and what differs there is
rounded off. In float32 a product may be computed in another order for the first and the last rows
of a batch: up to 9 units in the last place of the largest number, seen with short prompts on
several threads. Different tokens are far away from that: 19 pairs of SmolLM2's vocabulary are
within 9% of each other in bfloat16, 13 of them unused tokens with the same embedding; of the rest
the nearest unused ones are 88 such units apart, the nearest trained ones 500,000.
"""

from __future__ import annotations

import torch

from hf_reasoncache.shards import Shard
from hf_reasoncache.storage.new_tokens import NewTokens

ORDER = 32
"""Units in the last place of a vector's largest number that the order of its sums may make up."""


class PromptDeduplicator:
    """Finds rows with the same tokens, once per forward for all layers of a cache.

    The first layer that asks decides, where rounding has had the least chance to grow.
    """

    def __init__(self) -> None:
        self._layer: int | None = None
        self._first_like: torch.Tensor = torch.zeros(0, dtype=torch.long, device="cpu")

    def of(self, new: NewTokens, layer: int, groups: torch.Tensor, shard: Shard) -> torch.Tensor:
        """Return for each row the first row that brings the same tokens.

        Parameters
        ----------
        new : NewTokens
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
            found = shard.gather(_first_like(new, groups)[:, None])
            same = (found[:, None] == found).all(-1)
            self._layer, self._first_like = layer, same.int().argmax(-1)
        return self._first_like


def _first_like(new: NewTokens, groups: torch.Tensor) -> torch.Tensor:
    found = list(range(len(groups)))
    firsts: list[int] = []
    for row in found:
        # Copies of a prompt are neighbours as a rule.
        for first in reversed(firsts):
            if groups[first] == groups[row] and _same_tokens(new, first, row):
                found[row] = first
                break
        else:
            firsts.append(row)
    return torch.tensor(found, device="cpu")


def _same_tokens(new: NewTokens, one: int, other: int) -> bool:
    real: slice | torch.Tensor = slice(None)
    if new.valid is not None:
        if not torch.equal(new.valid[one], new.valid[other]):
            return False
        real = new.valid[one]
    return all(_equal(x[one][:, real], x[other][:, real]) for x in (new.keys, new.values))


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether all vectors are the same, in float32 and float64 up to the order of their sums."""
    if torch.equal(x, y):
        return True
    if x.element_size() < 4:
        return False
    rounding = ORDER * torch.finfo(x.dtype).eps * x.abs().amax(-1, keepdim=True)
    return bool(((x - y).abs() <= rounding).all())
