"""`quantise` and `dequantise` in plain PyTorch: their definition."""

from __future__ import annotations

import torch

LARGEST = 448.0
"""The largest number of e4m3."""


def quantise_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `triton_ops.fp8.quantise`."""
    # Never 0 nor too small to be precise, so that a row of zeros is one of zeros again. Rounded
    # before it is divided by, hence its rounding costs nothing: what is above 448 by that, by 0.4%
    # at most, becomes 448.
    scales = (x.abs().amax(-1).float() / LARGEST).to(x.dtype)
    scales = scales.clamp_min(torch.finfo(x.dtype).tiny)
    codes = (x.float() / scales.float()[..., None]).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scales


def dequantise_reference(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """See `triton_ops.fp8.dequantise`; computed in `dtype`."""
    return codes.view(torch.float8_e4m3fn).to(dtype) * scales.to(dtype)[..., None]
