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

AHEAD_BYTES = 68 * 1024
"""Keys and values that are on their way while a program computes: two programs and more fit a
multiprocessor of sm_90 and sm_100 (228 KB), and of sm_80 (164 KB) unless its queries are many."""


@triton.jit
def load_rows(base, rows, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr = 0):
    """Load `BLOCK` columns, from `FIRST` on, of rows of `SIZE` numbers.

    Zeros beyond the row and where the mask is False.
    """
    column = FIRST + tl.arange(0, BLOCK)
    found = tl.load(
        base + rows.to(tl.int64)[:, None] * SIZE + column[None, :],
        mask=mask[:, None] & (column < SIZE)[None, :],
        other=0,
    )
    if UPCAST and base.dtype.element_ty != tl.uint8:
        found = found.to(tl.float32)
    return found


@triton.jit
def dot_rows(a, b):
    """Products of all rows of `a` with all rows of `b`, in float32; exact for float32, not TF32."""
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def tile_logits(q, k, scale, softcap, q_rest=None, k_rest=None, key_scale=None):
    """Logits times log2(e), so that exp2 gives the weights; rows may come in two parts.

    Each key may have a scale of its own.
    """
    logits = dot_rows(q, k)
    if q_rest is not None:
        logits += dot_rows(q_rest, k_rest)
    logits *= scale
    if key_scale is not None:
        logits *= key_scale[None, :]
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


@lru_cache(maxsize=256)
def parts(size: int, values: int = 0) -> tuple[int, int]:
    """Columns of the two tiles in which rows of keys are loaded; 0 for a second that is not needed.

    One tile of a power of two would hold 1,024 columns where the latents of DeepSeek have 576.

    Parameters
    ----------
    size : int
        Numbers per row.
    values : int
        As many of them, the first ones, are the row's value; the first tile must hold these.
    """
    whole = block_d(size)
    half = whole // 2
    if size <= 128 or size == whole or values > half:
        return whole, 0
    return half, block_d(size - half)


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
    def of(dtype: torch.dtype, rows: int, *columns: int, codes: bool = False) -> Tile:
        """Choose for `rows` queries and the columns of what a step of the loop loads.

        Where keys or values are `codes` of 8 bits, widening them needs registers that more than 32
        queries would take, and more than 16 wide keys in the 4 warps of 16 queries.
        """
        widest = max(columns)
        if dtype == torch.float32:
            # No matrix unit takes float32 as it is: the products live in registers.
            return Tile(16, 32, 8, 1)
        m = min(64 if widest <= 128 and not codes else 32, max(16, power_of_two(rows)))
        n = 64 if widest <= 256 else 16 if codes and m == 16 else 32
        step = n * sum(columns) * dtype.itemsize
        stages = min(3, 1 + AHEAD_BYTES // step)
        # Outputs stay in registers, beside the logits of as many queries.
        outputs = m * widest > 4096 and len(columns) > 1
        return Tile(m, n, 8 if m > 16 and (widest > 128 or outputs) else 4, stages)
