"""TriAttention: how well a key fits the mean query of the model, seen from the next positions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch

from hf_reasoncache.scorers._checks import at_least
from hf_reasoncache.scorers.base import HeldTokens, Scorer


@dataclass(frozen=True, eq=False, repr=False)
class QueryStatistics:
    """What the queries of a model are like before RoPE turns them; compared by identity.

    RoPE turns pairs of numbers, number `f` and number `f + D / 2`; each pair is a complex number.

    Attributes
    ----------
    layers : tuple of int
        Indices in the model of the layers.
    mean : Tensor[L, H_kv, G, D]
        Mean query of each query head; `D / 2` real parts, then as many imaginary ones.
    norm : Tensor[L, H_kv, G, D / 2]
        Mean absolute value of each pair.
    frequencies : Tensor[D / 2]
        Angle of each pair per position, float64.

    Raises
    ------
    ValueError
        If the shapes do not fit together.
    """

    layers: tuple[int, ...]
    mean: torch.Tensor
    norm: torch.Tensor
    frequencies: torch.Tensor

    def __post_init__(self) -> None:
        wanted = (len(self.layers), *self.mean.shape[1:3], 2 * self.norm.shape[-1])
        same = self.mean.shape[:-1] == self.norm.shape[:-1]
        if tuple(self.mean.shape) != wanted or not same or self.mean.dim() != 4:
            raise ValueError(
                f"QueryStatistics: expected mean [L, H_kv, G, D] and norm [L, H_kv, G, D / 2] for "
                f"{len(self.layers)} layers, got {list(self.mean.shape)} and "
                f"{list(self.norm.shape)}."
            )
        if self.frequencies.shape != self.norm.shape[-1:]:
            raise ValueError(
                f"QueryStatistics: expected {self.norm.shape[-1]} frequencies, got "
                f"{list(self.frequencies.shape)}."
            )

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the numbers."""
        made = hashlib.sha256(repr(self.layers).encode())
        for each in (self.mean, self.norm, self.frequencies):
            made.update(each.double().cpu().contiguous().numpy().tobytes())
        return made.hexdigest()[:16]

    def __repr__(self) -> str:
        """Name the numbers by their digest."""
        return f"QueryStatistics({self.digest})"


@dataclass(frozen=True)
class TriAttention(Scorer):
    """TriAttention (arXiv 2604.04921): calibrated query statistics instead of recent queries.

    The paper's: the logit of a key under the mean query, averaged over the distances to positions
    1, 2, 4, ... ahead, plus the mean absolute value that the mean query lacks, times that of the
    key; normalised per query head, of which the best counts. Ours: keys stay as they are cached.
    A rotated query is a query like any other, so the average over all distances is one product
    with one query per row; absolute values do not change under rotation. Distances count from the
    newest token. Needs no queries.

    Attributes
    ----------
    statistics : QueryStatistics
        Of the model, see `hf_reasoncache.calibration.queries`.
    longest : int
        Farthest position ahead; distances are the powers of two up to it.
    """

    statistics: QueryStatistics
    longest: int = 65536

    def __post_init__(self) -> None:
        at_least(self, "longest", self.longest, 1, "the paper uses 65536")

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Best normalised score among the query heads of a KV head."""
        keys, known = held.keys.float(), self.statistics
        half = keys.shape[-1] // 2
        if held.layer not in known.layers or half != known.norm.shape[-1]:
            raise ValueError(
                f"TriAttention: expected statistics of layer {held.layer} with keys of "
                f"{keys.shape[-1]} numbers, got those of layers {list(known.layers)} with "
                f"{known.mean.shape[-1]}; calibrate this model."
            )
        place = known.layers.index(held.layer)
        heads = slice(held.first_head, held.first_head + keys.shape[1])
        mean = known.mean[place, heads].to(keys)
        norm = known.norm[place, heads].to(keys)
        sizes = torch.hypot(keys[..., :half], keys[..., half:])
        lacking = norm - torch.hypot(mean[..., :half], mean[..., half:])
        # [R, H_kv, G, D] times [R, H_kv, D, N].
        logits = self._ahead(mean, held.length) @ keys.mT + lacking @ sizes.mT
        valid = held.valid[:, :, None]
        count = valid.sum(-1, keepdim=True).clamp_min(1)
        apart = logits - logits.where(valid, 0).sum(-1, keepdim=True) / count
        spread = (apart.where(valid, 0).square().sum(-1, keepdim=True) / count).sqrt()
        return (apart / spread.clamp_min(1e-6)).amax(2)

    def _ahead(self, mean: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Mean over the distances of the mean query where it would stand, ``[R, H_kv, G, D]``."""
        frequencies = self.statistics.frequencies.to(length.device, torch.float64)
        ahead = 2 ** torch.arange(self.longest.bit_length(), device=length.device)
        # Angles of far positions need the digits of float64.
        at = (length[:, None] - 1 + ahead)[..., None] * frequencies
        cosine, sine = (each.mean(1).to(mean)[:, None, None] for each in (at.cos(), at.sin()))
        real, imaginary = mean.chunk(2, -1)
        turned = (real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        return torch.cat(turned, -1)
