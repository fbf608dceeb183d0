"""Expected Attention: the attention that the queries of the next positions are expected to pay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hf_reasoncache.scorers._checks import at_least
from hf_reasoncache.scorers.base import HeldTokens, Scorer
from triton_ops.launch import send


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Expected Attention (arXiv 2510.00636): attention of future queries, times the value's norm.

    The paper's: queries before RoPE are normally distributed, and turned by the mean of the
    rotations of the next positions. The expected weight of a key is then the exponential of its
    mean logit plus half of the variance of its logits, normalised over the tokens held; the mean
    over the query group is multiplied with the norm of the value. The first tokens are kept, and
    their queries not counted (512 positions and 4 tokens, as in kvpress). Ours: mean and covariance
    are those of the newest queries, not of the whole prompt, and never written out: mean and
    variance of a key's logits under these queries, turned to the next positions, are the same.

    Attributes
    ----------
    frequencies : tuple of float
        Angle of each pair of a query per position,
        `hf_reasoncache.geometry.rotary_frequencies(config)`: RoPE turns number `f` and number
        `f + D / 2` together.
    queries : int
        Newest queries of which mean and covariance are taken. Those of a group of `G` query heads
        take as much memory as `queries * G / 2` tokens of their KV head.
    ahead : int
        Next positions over which rotations are averaged.
    sinks : int
        First tokens, which are kept.

    Examples
    --------
    >>> from hf_reasoncache.geometry import rotary_frequencies
    >>> scorer = ExpectedAttention(tuple(rotary_frequencies(model.config)))
    >>> cache = ReasonAllocCache(model.config, budget=1024, scorer=scorer)
    """

    frequencies: tuple[float, ...] = field(repr=False)
    queries: int = 128
    ahead: int = 512
    sinks: int = 4

    comparable: ClassVar = "length"
    joins_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(self, "queries", self.queries, 1, "a mean needs a query; 128 is the default")
        at_least(self, "ahead", self.ahead, 1, "the paper uses 512")
        at_least(self, "sinks", self.sinks, 0, "the paper uses 4")

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Expected weights times norms of values; the first tokens as much as the best one."""
        queries, at = held.window(self.queries)
        counted = at >= self.sinks
        share = counted / counted.sum(-1, keepdim=True).clamp_min(1)
        share = share[:, None, None, :, None]
        # [R, H_kv, G * A, D] times [R, H_kv, D, N].
        turned = self._turned(queries, held.length[:, None] - at)
        logits = held.scaling * (turned.flatten(2, 3) @ held.keys.float().mT)
        logits = logits.unflatten(2, queries.shape[2:4])
        mean = (share * logits).sum(-2)
        variance = (share * (logits - mean[..., None, :]).square()).sum(-2)
        first = held.positions < self.sinks
        others = held.valid & ~first
        lowest = torch.finfo(logits.dtype).min
        weights = (mean + variance / 2).masked_fill(~others[:, :, None], lowest).softmax(-1)
        scores = weights.mean(2) * held.values.float().norm(dim=-1)
        return scores.where(others, scores.where(others, 0).amax(-1, keepdim=True))

    def _turned(self, queries: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Turn queries as the mean rotation from theirs to the next positions does.

        Parameters
        ----------
        queries : Tensor[R, H_kv, G, A, D]
        distance : LongTensor[R, A]
            From each query to the next position.

        Returns
        -------
        Tensor[R, H_kv, G, A, D]
        """
        if queries.shape[-1] != 2 * len(self.frequencies):
            raise ValueError(
                f"ExpectedAttention: expected queries of {2 * len(self.frequencies)} numbers, two "
                f"per frequency, got {queries.shape[-1]}; take the frequencies of this model."
            )
        # Angles of far positions need the digits of float64.
        angle = send(torch.tensor(self.frequencies, dtype=torch.float64), queries.device)
        ahead = torch.arange(self.ahead, device=queries.device)[:, None] * angle
        reached = distance[..., None] * angle
        turn = torch.polar(torch.ones_like(ahead), ahead).mean(0)
        turn = turn * torch.polar(torch.ones_like(reached), reached)
        pairs = torch.complex(*queries.float().chunk(2, -1)) * turn[:, None, None].to(
            torch.complex64
        )
        return torch.cat([pairs.real, pairs.imag], -1)
