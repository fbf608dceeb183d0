"""Which implementation runs the operations: the Triton kernels or PyTorch.

The choice is one for the whole process: `set_backend`, the context manager `use_backend`, or the
environment variable `REASONCACHE_BACKEND`, which is read when this module is first imported.

- `"auto"` (the default): Triton for CUDA tensors of a type that the kernels know, PyTorch for all
  others.
- `"triton"`: Triton, or an error that says why not. CPU tensors need Triton's interpreter, which is
  for tests: `TRITON_INTERPRET=1`, set before Triton is imported.
- `"torch"`: PyTorch, on any device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal, cast, get_args

import torch

__all__ = [
    "Backend",
    "chosen",
    "describe",
    "get_backend",
    "interpreting",
    "set_backend",
    "use_backend",
    "uses_triton",
]

Backend = Literal["auto", "triton", "torch"]

VARIABLE = "REASONCACHE_BACKEND"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels compute on."""


def _checked(name: str, source: str) -> Backend:
    if name not in get_args(Backend):
        raise ValueError(f"{source}: expected one of {get_args(Backend)}, got {name!r}.")
    return cast(Backend, name)


# Not a context variable: a new thread starts without those, and `generate` is often run in one (to
# stream its output). An explicit choice must reach it.
_requested = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def get_backend() -> Backend:
    """Return the choice in force; what it means for a tensor is answered by `chosen`."""
    return _requested


def set_backend(name: Backend) -> None:
    """Choose the backend of all operations in this process.

    Parameters
    ----------
    name : {"auto", "triton", "torch"}

    Raises
    ------
    ValueError
        If the name is another one.
    """
    global _requested
    _requested = _checked(name, "set_backend")


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Choose the backend inside a `with` block, in all threads, and put the old one back."""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def chosen(device: torch.device, dtype: torch.dtype | None = None) -> Literal["triton", "torch"]:
    """Return the implementation that runs for tensors of a device and a type.

    Parameters
    ----------
    device : device
    dtype : dtype, optional
        What is computed on; None if numbers are only moved.

    Raises
    ------
    ValueError
        If "triton" was chosen and cannot run: there is no silent fallback from an explicit choice.
    """
    if _requested == "torch":
        return "torch"
    if _requested == "auto":
        able = device.type == "cuda" and dtype in (None, *DTYPES) and _installed()
        return "triton" if able else "torch"
    if not _installed():
        raise ValueError(
            "backend 'triton': expected the package triton, which is not installed; install it "
            "(Linux only), or choose 'auto' or 'torch'."
        )
    if device.type != "cuda" and not interpreting():
        raise ValueError(
            f"backend 'triton': expected CUDA tensors, got tensors on {device.type}; move the "
            "model to a GPU, choose 'auto' or 'torch', or set TRITON_INTERPRET=1 before Python "
            "starts to run the kernels in Triton's interpreter, which is slow and for tests."
        )
    if dtype not in (None, *DTYPES):
        names = ", ".join(str(each) for each in DTYPES)
        raise ValueError(
            f"backend 'triton': expected one of {names}, got {dtype}; convert the tensors, or "
            "choose 'auto' or 'torch'."
        )
    return "triton"


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Name what runs for tensors of a device and a type, for people; errors as `chosen`."""
    name = chosen(device, dtype)
    return "triton (interpreter)" if name == "triton" and interpreting() else name


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether the kernel, not the path in PyTorch, runs for this tensor; errors as `chosen`."""
    # Asked at every step and layer, where a look at the device's type takes microseconds.
    if _requested != "triton" and not tensor.is_cuda:
        return False
    return chosen(tensor.device, tensor.dtype) == "triton"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: on the CPU, slowly, for tests."""
    if not _installed():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
