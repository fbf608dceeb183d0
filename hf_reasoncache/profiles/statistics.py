"""The measurements behind a profile's demand: named tensors in a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from hf_reasoncache.messages import shown

DTYPES = (torch.float64, torch.float32, torch.int64, torch.int32)
SAFETENSORS_ERRORS = (
    SafetensorError,
    # Besides its own error, the library lets through what torch and its tables of types raise.
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,
    OverflowError,
)
"""Exceptions of reading a file that holds no tensors."""

_MOST_DIMENSIONS = 8  # torch's own operations stop at 64, some of them sooner


def check_statistics(statistics: object, *, prompts: int, layers: int) -> None:
    """Raise ValueError unless these are named tensors `[prompts, layers, ...]` of finite numbers.

    Parameters
    ----------
    statistics : object
        Expected to be a mapping of str to Tensor, dtypes `DTYPES`.
    prompts, layers : int
        Prompts of the calibration and full-attention layers of the model.
    """
    if not isinstance(statistics, Mapping):
        raise ValueError(
            f"statistics: expected a mapping of names to tensors, got {type(statistics).__name__}."
        )
    for name, tensor in statistics.items():
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise ValueError(f"statistics: expected printable names, got {shown(name)}.")
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(
                f"statistics[{shown(name)}]: expected a tensor of one of {DTYPES}, got {kind}."
            )
        if tensor.dim() > _MOST_DIMENSIONS:
            raise ValueError(
                f"statistics[{shown(name)}]: expected at most {_MOST_DIMENSIONS} dimensions, got "
                f"{tensor.dim()}."
            )
        if tuple(tensor.shape[:2]) != (prompts, layers):
            raise ValueError(
                f"statistics[{shown(name)}]: expected shape [{prompts}, {layers}, ...] (prompts, "
                f"layers), got {shown(list(tensor.shape))}."
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"statistics[{shown(name)}]: expected finite numbers, got NaN or infinity."
            )


def dump_statistics(statistics: Mapping[str, torch.Tensor]) -> bytes:
    """Serialise; equal tensors give equal bytes."""
    return save({name: statistics[name].contiguous().cpu() for name in sorted(statistics)})


def parse_statistics(data: bytes) -> dict[str, torch.Tensor]:
    """Read what `dump_statistics` wrote.

    Raises
    ------
    ValueError
        If the bytes are no safetensors file, or hold a kind of tensor that torch does not have.
    """
    try:
        return dict(sorted(load(data).items()))
    except SAFETENSORS_ERRORS as error:
        raise ValueError(
            f"expected a safetensors file, got something else: {shown(error)}; copy or download "
            "the profile again."
        ) from error
