"""What every launch needs, whichever kernels it launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_HERE = nullcontext()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the GPU of a tensor the current one inside a `with` block; nothing for other tensors."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else _HERE


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small tensor of the host to a device; the host neither waits nor has to keep it.

    CUDA copies from memory that is not pinned to a buffer of its own before the call returns.
    """
    return tensor.to(device, non_blocking=True)


def launcher(run: Callable[P, T]) -> Callable[P, T]:
    """Let a function that launches kernels do so on the GPU of its first tensor.

    Triton launches on the current device, whatever device the pointers belong to. A model spread
    over several GPUs (`device_map`) calls its layers with the first one current.
    """

    @functools.wraps(run)
    def launched(*args: P.args, **kwargs: P.kwargs) -> T:
        with on_device(next(each for each in args if isinstance(each, torch.Tensor))):
            return run(*args, **kwargs)

    return launched
