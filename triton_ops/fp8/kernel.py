"""Kernels of `quantise`, and how others read what it makes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launcher
from ..tiles import block_d

LARGEST = tl.constexpr(448.0)

# Exponents of e4m3 count from 7, those of float16 from 15, of float32 and bfloat16 from 127.
FROM_7_TO_15 = tl.constexpr(2.0**8)
FROM_7_TO_127 = tl.constexpr(2.0**120)


@triton.jit
def encode(x):
    """Bits of e4m3 of float32 numbers of at most 464, rounded to the nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # Below 2^-6 the codes are multiples of 2^-9: adding 2^14 leaves these as the last bits.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
    odd = (size >> 20) & 1
    # Another first exponent, and half of the last bit that stays.
    usual = (size - (120 << 23) + 0x7FFFF + odd) >> 20
    code = tl.where(size < (121 << 23), small, usual)
    return (code | sign).to(tl.uint8)


@triton.jit
def spread(codes, TYPE: tl.constexpr):
    """Bits of e4m3 in the places that sign, exponent and fraction have in another type.

    Widening repeats the sign in all upper bits, of which a mask leaves the first.
    """
    signed = codes.to(tl.int8, bitcast=True)
    if TYPE == tl.float16:
        bits = (signed.to(tl.int16) << 7) & -0x4001
    elif TYPE == tl.bfloat16:
        bits = (signed.to(tl.int16) << 4) & -0x7801
    else:
        bits = (signed.to(tl.int32) << 20) & -0x78000001
    return bits.to(TYPE, bitcast=True)


@triton.jit
def decode(codes, TYPE: tl.constexpr):
    """Numbers of e4m3 in another type, without a conversion that older GPUs do not have."""
    if TYPE == tl.float16:
        found = spread(codes, TYPE) * FROM_7_TO_15
    else:
        found = spread(codes, TYPE) * FROM_7_TO_127
    return found


@triton.jit(do_not_specialize=["rows", "tokens", "batch_stride", "head_stride", "token_stride"])
def quantise_kernel(
    x,
    codes,
    scales,
    rows,
    tokens,
    heads,
    batch_stride,
    head_stride,
    token_stride,
    TINY: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Codes and scale of some rows; a row is a token of a head."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    real = row < rows
    head = row // tokens
    begin = head // heads * batch_stride + head % heads * head_stride + row % tokens * token_stride
    inside = real[:, None] & (column < D)[None, :]
    found = tl.load(x + begin[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    size = tl.div_rn(tl.max(tl.abs(found), 1), LARGEST)
    scale = tl.maximum(size.to(scales.dtype.element_ty), TINY)
    tl.store(scales + row, scale, mask=real)
    code = encode(tl.div_rn(found, scale.to(tl.float32)[:, None]))
    tl.store(codes + row[:, None] * D + column[None, :], code, mask=inside)


@launcher
def quantise_triton(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `triton_ops.fp8.quantise`."""
    batch, heads, tokens, size = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = x.new_empty(x.shape[:3])
    rows, columns = batch * heads * tokens, block_d(size)
    block = max(1, 2048 // columns) if tokens > 1 else 1
    quantise_kernel[(-(-rows // block),)](
        x,
        codes,
        scales,
        rows,
        tokens,
        heads,
        *x.stride()[:3],
        TINY=torch.finfo(x.dtype).tiny,
        D=size,
        BLOCK_D=columns,
        BLOCK_N=block,
        num_warps=4 if block > 1 else 1,
    )
    return codes, scales
