"""Which keys are near each other: a product of matrices says so by its size or by its sign."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import cpu_features

NORMAL = 128
"""Bits, read as an integer, of the smallest bfloat16 that is not subnormal."""

# By which end of a row each end of a column is multiplied: each number by each, but the lowest two.
_OPPOSITE = torch.tensor([0, 2, 1, 3, 5, 4], device="cpu")
# Norms with which products of keys, and their sums, stay within what float32 can hold.
_ORDINARY = (2.0**-40, 2.0**40)
# What a cosine may lose when both keys are rounded to bfloat16, and the sum to float32.
_ROUNDING = 2.0**-8 + 2.0**-16


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The keys of some heads, ready to be compared with each other.

    Attributes
    ----------
    rows : Tensor[S, N, K]
        What is multiplied: unit keys, or, in bfloat16, keys and six numbers that stand for the
        threshold; then the sign of a product tells whether two keys are near.
    bar : float
        What a product exceeds where two keys are near each other.
    sure : bool
        False if it does so too where they only may be: their cosine is not far below the threshold.
    """

    rows: torch.Tensor
    bar: float
    sure: bool = True

    @classmethod
    def of(
        cls,
        keys: torch.Tensor,
        norm: torch.Tensor,
        inverse: torch.Tensor,
        threshold: float,
    ) -> Neighbours:
        """Choose what is fastest here.

        Parameters
        ----------
        keys : Tensor[S, N, D]
            Filler is zero.
        norm, inverse : Tensor[S, N, 1]
            Of each key, in the dtype to compute in; any number is the inverse of 0.
        threshold : float
            Cosine over which two keys are near each other.
        """
        if keys.dtype in (torch.bfloat16, torch.float32) and _multiplies_bfloat16(keys):
            low, high = _ORDINARY
            sure = keys.dtype == torch.bfloat16
            least = threshold if sure else threshold - _ROUNDING
            # A key of zeros compares with anything.
            smallest, largest = norm.masked_fill(norm == 0, 1.0).aminmax()
            if least >= 0 and low < float(smallest) and float(largest) < high:
                return cls.by_sign(keys.bfloat16(), norm, least, sure)
        return cls.by_size(keys, inverse, threshold)

    @classmethod
    def by_size(cls, keys: torch.Tensor, inverse: torch.Tensor, threshold: float) -> Neighbours:
        """Compare unit keys with each other."""
        return cls(keys.to(inverse.dtype) * inverse, threshold)

    @classmethod
    def by_sign(
        cls, keys: torch.Tensor, norm: torch.Tensor, threshold: float, sure: bool
    ) -> Neighbours:
        """Compare keys in bfloat16, which many CPUs multiply four times as fast as float32.

        Products of two bfloat16 are exact in float32, in which they are summed, but the sum comes
        back rounded to 8 bits. So the threshold times both norms is subtracted inside the product,
        by a few more entries: rounding keeps the sign, which is as exact as a product in float32.

        Keys that were rounded to bfloat16 first are not `sure`: they find all neighbours, under a
        threshold lowered by what rounding may cost, and whoever asks must look at the cosine.
        """
        # In three numbers of 8 bits each; products of the lower ones are too small to matter.
        first, rest = _split(norm * threshold**0.5)
        second, rest = _split(rest)
        third, _ = _split(rest)
        return cls(torch.cat([keys, first, first, second, second, first, third], -1), 0.0, sure)

    @property
    def signed(self) -> bool:
        """Whether products are told apart by their sign."""
        return self.rows.dtype == torch.bfloat16

    @property
    def multiple(self) -> int:
        """Prefer this many columns, or a multiple of it.

        In bfloat16, a number that is new costs the CPU's library a compilation, and reductions
        over numbers of 16 bits are made for blocks of 64.
        """
        return 64 if self.signed else 1

    def block(self, start: int, end: int) -> torch.Tensor:
        """Products `[S, end, end - start]` of the keys before `end` with some of them."""
        product = self.rows[:, :end] @ self._opposite(self.rows[:, start:end]).mT
        product[:, start:].diagonal(dim1=-2, dim2=-1).zero_()
        return product

    def columns(self, place: torch.Tensor) -> torch.Tensor:
        """Return the keys in places `[S, A]` as columns: Tensor `[S, A, K]`."""
        return self._opposite(whole_rows(self.rows, place))

    def _opposite(self, rows: torch.Tensor) -> torch.Tensor:
        """Turn rows into columns."""
        if not self.signed:
            return rows
        ends = len(_OPPOSITE)
        return torch.cat([rows[..., :-ends], -rows[..., -ends:].index_select(-1, _OPPOSITE)], -1)

    def near(self, product: torch.Tensor) -> torch.Tensor:
        """Turn products into numbers that are positive where they exceed the bar, in place.

        Numbers instead of booleans, which take 7 times as long on a CPU.
        """
        if self.signed:
            # Positive numbers have positive bits, and at least `NORMAL` of them: instructions that
            # multiply bfloat16 turn subnormal results into zero.
            return product.view(torch.int16)
        return product.gt_(self.bar)


def whole_rows(
    source: torch.Tensor, place: torch.Tensor, heads: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows `[S, A, K]` of `source` `[H, N, K]` in places `[S, A]` of `heads`, all by default."""
    heads = torch.arange(source.shape[0], device=source.device) if heads is None else heads
    # 6 times faster on a CPU than indexing by head and place.
    flat = (place + heads[:, None] * source.shape[1]).flatten()
    return source.flatten(0, 1).index_select(0, flat).view(*place.shape, source.shape[2])


def _split(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to bfloat16; also return what that leaves."""
    rounded = numbers.to(torch.bfloat16)
    return rounded, numbers - rounded


def _multiplies_bfloat16(keys: torch.Tensor) -> bool:
    if keys.device.type != "cpu":
        return False
    able = cpu_features.capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
