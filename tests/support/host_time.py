"""How long the host needs to ask a GPU for a decode step, beside `DynamicCache`.

    python -m tests.support.host_time
    python -m tests.support.host_time --rows 16 --budget 16

The model is so small that its operations take the CPU about as long as asking a GPU for them would,
and launches of our kernels stop after all that Triton does before it calls the driver. So the
tokens mean nothing, and the ratio tells what of a step is ours. An eager step is meant: a CUDA
graph asks once for all of it.

What an eviction asks for is a matter of rows and layers, not of tokens. With few of them its
operations compute on the CPU for no longer than it takes to ask for them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest import mock

import torch
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.releases import cache_kwarg
from tests.support.ops.offline import compiling
from triton_ops import backend

BUFFER = 16


@contextmanager
def unlaunched() -> Iterator[None]:
    """Let CPU tensors take the way of the kernels, up to the driver."""
    runs = mock.patch.object(backend, "interpreting", lambda: True)
    with compiling(90), runs, backend.use_backend("triton"):
        yield


def steps(model: Any, cache: Cache, rows: int, prompt: int) -> Iterator[float]:
    """Yield the processor time of one step after the other, in seconds."""
    ids = torch.randint(3, 60, (rows, prompt))
    with torch.inference_mode():
        with backend.use_backend("torch"):
            model(ids, **cache_kwarg(cache), use_cache=True)
        for seen in count(prompt + 1):
            inputs = {"input_ids": ids[:, :1], "attention_mask": torch.ones(rows, seen)}
            position = torch.full((rows, 1), seen - 1)
            begin = time.process_time()
            model(**inputs, position_ids=position, **cache_kwarg(cache), use_cache=True)
            yield time.process_time() - begin


def main() -> None:
    """Print milliseconds per step, and ratios."""
    parser = argparse.ArgumentParser(description="Time the host's part of a decode step.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--budget", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=given.layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
    )  # fmt: skip
    makers: dict[str, Callable[[], Cache]] = {
        "DynamicCache": lambda: DynamicCache(config=config),
        "no budget": lambda: ReasonAllocCache(config, budget=None),
        "budget": lambda: ReasonAllocCache(
            config, budget=given.budget, buffer=BUFFER, window=8, protect=False
        ),
    }
    runs = {}
    for name, make in makers.items():
        model = LlamaForCausalLM(config).eval()
        model.set_attn_implementation("sdpa" if name == "DynamicCache" else "reasoncache")
        runs[name] = steps(model, make(), given.rows, given.budget + BUFFER // 2)
    times: dict[str, list[float]] = {name: [] for name in runs}
    with unlaunched():
        # Turn by turn, so that whatever else the machine does hits all alike; the first steps make
        # what is made once.
        for step in range(2 * BUFFER + given.steps):
            for name, run in runs.items():
                taken = next(run)
                if step >= 2 * BUFFER:
                    times[name].append(taken)
    base = statistics.median(times["DynamicCache"])
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"{name:14} {1000 * middle:6.2f} ms per step, {middle / base:.2f} of DynamicCache's")
    ordinary = statistics.median(times["budget"])
    # One step in so many evicts.
    taken = times["budget"]
    extra = max(statistics.median(taken[each::BUFFER]) for each in range(BUFFER)) - ordinary
    print(f"an eviction of all layers: {1000 * extra:.2f} ms more than a step")


if __name__ == "__main__":
    main()
