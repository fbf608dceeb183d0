"""Counting what a process sends to the others of its group."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = ("allreduce_", "all_reduce", "all_gather_into_tensor", "allgather_")


class Traffic(TorchDispatchMode):
    """Count collectives while it is entered.

    A model sums outputs (`allreduce_`, `all_reduce`) and joins logits (`all_gather_into_tensor`);
    what caches tell each other is an `allgather_`, and nothing else is.

    Attributes
    ----------
    messages, bytes : Counter
        By name of the collective: how many, and what this process put into them.
    seconds : Counter
        Until each had ended; with gloo, waiting for the others included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        if "c10d" not in func.namespace or name not in COLLECTIVES:
            return func(*args, **(kwargs or {}))
        sent = args[1] if name == "allgather_" else args[0]
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            out[1].wait()
        self.seconds[name] += time.perf_counter() - begin
        self.messages[name] += 1
        self.bytes[name] += sum(x.nbytes for x in (sent if isinstance(sent, list) else [sent]))
        return out
