"""What the kernels share: tiles of rows, logits, sizes of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .backend import interpreting

LOG2_E = tl.constexpr(1.4426950408889634)

# Logarithm of the weight of nothing. Finite, since inf - inf is NaN.
NOTHING = tl.constexpr(-1.0e30)

# Triton's interpreter multiplies bfloat16 matrices wrongly, so there tiles are widened on loading.
# Whether kernels are interpreted is decided when they are imported, hence once.
UPCAST = tl.constexpr(interpreting())

AHEAD_BYTES = 64 * 1024
"""Keys and values that are on their way while a program computes: two programs and more fit a
multiprocessor of sm_90 (228 KB) and of sm_80 (164 KB)."""


@triton.jit
def load_rows(base, rows, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of `SIZE` numbers; zeros beyond the row and where the mask is False."""
    column = tl.arange(0, BLOCK)
    found = tl.load(
        base + rows.to(tl.int64)[:, None] * SIZE + column[None, :],
        mask=mask[:, None] & (column < SIZE)[None, :],
        other=0.0,
    )
    if UPCAST:
        found = found.to(tl.float32)
    return found


@triton.jit
def dot_rows(a, b):
    """Products of all rows of `a` with all rows of `b`, in float32; exact for float32, not TF32."""
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def tile_logits(q, k, scale, softcap):
    """Logits times log2(e), so that exp2 gives the weights."""
    logits = dot_rows(q, k) * scale
    if softcap is not None:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), with both ends right where exp overflows.
        logits = softcap - 2.0 * softcap / (tl.exp2(logits * (2.0 * LOG2_E / softcap)) + 1.0)
    return logits * LOG2_E


# Triton's own functions for the next two are made for kernels and take microseconds on the host.


def blocks(size: int, block: int) -> int:
    """How many blocks hold `size` things."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below `size >= 1`."""
    return 1 << (size - 1).bit_length()


def block_d(size: int) -> int:
    """Columns of a tile of keys or values."""
    return max(16, power_of_two(size))


@dataclass(frozen=True)
class Tile:
    """How one program works, chosen so that nothing spills; a test compiles and reads it.

    Attributes
    ----------
    m : int
        Queries per tile: 16 is what the matrix units take.
    n : int
        Keys per tile.
    warps, stages : int
        Threads over 32, and tiles in flight.
    """

    m: int
    n: int
    warps: int
    stages: int

    @staticmethod
    @lru_cache(maxsize=256)
    def of(dtype: torch.dtype, rows: int, *sizes: int) -> Tile:
        """Choose for `rows` queries and the row sizes of what a step of the loop loads."""
        widest = max(block_d(size) for size in sizes)
        if dtype == torch.float32:
            # No matrix unit takes float32 as it is: the products live in registers.
            return Tile(16, 32, 8, 1)
        m = min(64 if widest <= 128 else 32, max(16, power_of_two(rows)))
        n = 64 if widest <= 256 else 32
        step = n * sum(block_d(size) for size in sizes) * dtype.itemsize
        stages = min(3, 1 + AHEAD_BYTES // step)
        return Tile(m, n, 8 if widest > 128 and m > 16 else 4, stages)
