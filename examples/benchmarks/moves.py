"""Counting what is moved between devices."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Moves(TorchDispatchMode):
    """Count tensors that are sent to a device while it is entered.

    Offloaded weights count wherever they run: on a CPU, as copies from one place in its memory to
    another.

    Attributes
    ----------
    tensors : Counter
        By source, target and shape.
    bytes : int
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out, name = func(*args, **(kwargs or {})), func.__name__.split(".")[0]
        if name == "_to_copy" and (kwargs or {}).get("device") is not None:
            self._count(args[0], out)
        elif name == "copy_" and args[0].device != args[1].device:
            self._count(args[1], out)
        return out

    def _count(self, source: Any, target: Any) -> None:
        self.tensors[str(source.device), str(target.device), tuple(source.shape)] += 1
        self.bytes += source.nbytes
