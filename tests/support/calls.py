"""The calls of one decoding step, in order: what somebody reads who follows a token.

`python -m tests.support.calls` prints, for a Llama of one layer, how many of our functions a step
calls, how often one call after another is in another file, and in how many files; `--list KIND`
prints the calls.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, cache_utils

from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache
from hf_reasoncache.releases import cache_kwarg

ROOT = Path(__file__).resolve().parents[2]
OWN = (str(ROOT / "hf_reasoncache"), str(ROOT / "triton_ops"))
STEPS = 150

CACHES: dict[str, Callable[[LlamaConfig], Cache]] = {
    "DynamicCache": lambda config: DynamicCache(config=config),
    "budget=None": lambda config: ReasonAllocCache(config, budget=None),
    "budget": lambda config: ReasonAllocCache(
        config, budget=64, buffer=16, window=8, protect=False
    ),
    "windows": lambda config: SlidingWindowCompressCache(config, window=32, recent=8),
}


@dataclass(frozen=True)
class Call:
    """A function that was called.

    Attributes
    ----------
    file : str
        Path below the root of the repository, or a file of transformers.
    function : str
    """

    file: str
    function: str

    def __str__(self) -> str:
        return f"{self.file}: {self.function}"


def calls_of(step: Callable[[], object], files: tuple[str, ...] = OWN) -> list[Call]:
    """Run a step and return the calls of functions in some files or folders, in order."""
    found: list[Call] = []

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(files):
            found.append(Call(path.removeprefix(f"{ROOT}/"), frame.f_code.co_name))

    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


def decoding_steps(kind: str) -> list[list[Call]]:
    """Calls of each of `STEPS` single-token steps over a short prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model, cache = LlamaForCausalLM(config).eval(), CACHES[kind](config)
    stock = kind == "DynamicCache"
    model.set_attn_implementation("sdpa" if stock else "reasoncache")
    files = (cache_utils.__file__,) if stock else OWN

    def forward(tokens: int) -> list[Call]:
        ids = torch.randint(config.vocab_size, (1, tokens))
        return calls_of(lambda: model(input_ids=ids, **cache_kwarg(cache), use_cache=True), files)

    with torch.inference_mode():
        forward(20)
        return [forward(1) for _ in range(STEPS)]


def plain_and_evicting(kind: str) -> tuple[list[Call], list[Call]]:
    """Calls of a step that evicts nothing, and of one that evicts, when both are routine."""
    routine = decoding_steps(kind)[STEPS // 2 :]
    return min(routine, key=len), max(routine, key=len)


def moves(calls: list[Call]) -> int:
    """How many calls are in another file than the one before."""
    return sum(one.file != other.file for one, other in pairwise(calls))


def main() -> None:
    """Print the table, or the calls of one kind of cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", choices=CACHES, help="print the calls of its evicting step")
    given = parser.parse_args()
    if given.list:
        print(*plain_and_evicting(given.list)[1], sep="\n")
        return
    print(f"{'':14}{'a step':>27}{'a step that evicts':>27}")
    print(f"{'cache':14}" + f"{'calls':>9}{'moves':>9}{'files':>9}" * 2)
    for kind in CACHES:
        print(f"{kind:14}", end="")
        for calls in plain_and_evicting(kind):
            files = {call.file for call in calls}
            print(f"{len(calls):9}{moves(calls):9}{len(files):9}", end="")
        print()


if __name__ == "__main__":
    main()
