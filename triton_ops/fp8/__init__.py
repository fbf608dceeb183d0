"""Rows of numbers as codes of 8 bits (e4m3) with a scale each, and back."""

from __future__ import annotations

import torch

from ..backend import uses_triton
from .cpu import decoded
from .reference import dequantise_reference, quantise_reference

__all__ = ["dequantise", "quantise"]


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn each row into codes of 8 bits and one scale.

    Parameters
    ----------
    x : Tensor[B, H, T, D]

    Returns
    -------
    codes : ByteTensor[B, H, T, D]
        The bits of float8_e4m3fn numbers; bytes, since PyTorch moves no others on every device.
    scales : Tensor[B, H, T]
        In the type of `x`; a number is its code times the scale of its row.
    """
    if uses_triton(x):
        from .kernel import quantise_triton

        return quantise_triton(x)
    return quantise_reference(x)


def dequantise(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Turn codes back into numbers of the scales' type.

    Parameters
    ----------
    codes : ByteTensor[..., D]
    scales : Tensor[...]

    Returns
    -------
    Tensor[..., D]
    """
    if codes.is_cpu:
        return decoded(codes, scales.dtype).mul_(scales[..., None])
    return dequantise_reference(codes, scales, scales.dtype)
