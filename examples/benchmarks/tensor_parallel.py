"""What processes tell each other so that evictions are those of one process, and what it changes.

    torchrun --nproc-per-node 2 -m examples.benchmarks.tensor_parallel
    python -m examples.benchmarks.tensor_parallel

The first command shares a tiny reasoner among processes, the second does the same work in one. The
tokens of both have the same fingerprint where processes agree, in float64 at least: in float32, a
sum in another order may tip a close decision.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel

from examples.benchmarks.machine import Machine
from examples.benchmarks.options import new_parser
from examples.benchmarks.traffic import Traffic
from examples.benchmarks.workload import DTYPES
from examples.research.policies import BUFFER, WINDOW
from examples.research.tables import write_csv
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, TASKS, Problem, check, make_problems
from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache
from hf_reasoncache.evaluation.generation import answer_batch
from hf_reasoncache.scorers import H2O
from hf_reasoncache.shards import Shard
from hf_reasoncache.storage.pool import RaggedPool

SEED = DEVELOPMENT_SEEDS[700]
BATCH = 25


def caches(budget: int) -> dict[str, Any]:
    """Makers of caches by name; pairs differ in whether processes agree."""
    alloc: dict[str, Any] = {
        "budget": budget,
        "buffer": BUFFER,
        "window": WINDOW,
        "protect": False,
        "head_budgets": True,
    }
    # Attention mass differs much more from head to head than the default scorer's scores.
    alloc["scorer"] = H2O(recent_ratio=0.0)
    bound = {"window": 32, "ratio": 0.4, "max_budget": budget, "protect": False}
    both = ("agree", "local")
    return {
        "full": lambda config: DynamicCache(config=config),
        **{
            f"ReasonAlloc, {way}": partial(ReasonAllocCache, **alloc, tensor_parallel=way)
            for way in both
        },
        **{
            f"windows, {way}": partial(
                SlidingWindowCompressCache, **bound, head_budgets=True, tensor_parallel=way
            )
            for way in both
        },
        **{
            f"risk, {way}": partial(ReasonAllocCache, **alloc, risk=0.05, tensor_parallel=way)
            for way in both
        },
    }


class Clock:
    """Counts compactions of layers, and the messages of caches with their time, while entered."""

    def __enter__(self) -> Clock:
        self.compactions = self.messages = 0
        self.seconds = 0.0
        self._gather, self._compact = Shard.gather, RaggedPool.compact

        def gather(shard: Shard, own: torch.Tensor) -> torch.Tensor:
            begin = time.perf_counter()
            out = self._gather(shard, own)
            self.seconds += (time.perf_counter() - begin) * shard.agrees
            self.messages += shard.agrees
            return out

        def compact(pool: RaggedPool, *args: torch.Tensor) -> None:
            self.compactions += 1
            self._compact(pool, *args)

        Shard.gather, RaggedPool.compact = gather, compact  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Shard.gather, RaggedPool.compact = self._gather, self._compact  # type: ignore[method-assign]


@dataclass
class Result:
    """What one cache gave: marks, a fingerprint of all tokens, and counts."""

    correct: list[bool]
    fingerprint: str
    clock: Clock


def run(model: PreTrainedModel, tokenizer: Any, problems: Sequence[Problem], make: Any) -> Result:
    """Answer all problems with one kind of cache."""
    print_of, marks = hashlib.sha256(), []
    with Clock() as clock:
        for first in range(0, len(problems), BATCH):
            batch = problems[first : first + BATCH]
            found = answer(model, tokenizer, batch, make(model.config))
            tokens = [list(each.tokens) for each in found.answers]
            print_of.update(repr(tokens).encode())
            texts = tokenizer.batch_decode(tokens)
            marks += [check(*pair).correct for pair in zip(batch, texts, strict=True)]
    return Result(marks, print_of.hexdigest()[:8], clock)


def answer(model: PreTrainedModel, tokenizer: Any, batch: Sequence[Problem], cache: Cache) -> Any:
    """One batch, greedily."""
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in batch]
    longest = max(problem.max_new_tokens for problem in batch)
    return answer_batch(model, prompts, cache, max_new_tokens=longest)


def line(name: str, result: Result, traffic: Traffic) -> dict[str, str]:
    """One row of the table; traffic is that of the first batch."""
    clock = result.clock
    own, sent = traffic.messages["allgather_"], traffic.bytes["allgather_"]
    others, weight = traffic.messages.total() - own, traffic.bytes.total() - sent
    return {
        "cache": name,
        "correct": f"{100 * sum(result.correct) / len(result.correct):.1f}",
        "tokens": result.fingerprint,
        "compactions": str(clock.compactions),
        "messages": str(clock.messages),
        "ms each": f"{1e3 * clock.seconds / clock.messages:.2f}" if clock.messages else "-",
        "KB each": f"{sent / own / 1e3:.2f}" if own else "-",
        "of model's messages": f"{own / others:.2%}" if others else "-",
        "of its bytes": f"{sent / weight:.2%}" if weight else "-",
    }


def show(rows: Sequence[dict[str, str]]) -> str:
    """Two tables of 80 columns."""
    sides = [list(rows[0])[1:5], list(rows[0])[5:]]
    parts = []
    for side in sides:
        widths = [max(len(key), *(len(row[key]) for row in rows)) + 2 for key in side]
        heads = "".join(f"{key:>{width}}" for key, width in zip(side, widths, strict=True))
        parts.append(f"{'':25}{heads}")
        for row in rows:
            cells = "".join(f"{row[key]:>{w}}" for key, w in zip(side, widths, strict=True))
            parts.append(f"{row['cache']:25}{cells}")
        parts.append("")
    return "\n".join(parts)


def load(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return the whole model, or this process's share of it."""
    shared: dict[str, Any] = {}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        shared = {"tp_plan": "auto"}
    model = AutoModelForCausalLM.from_pretrained(
        MODELS[family], attn_implementation="reasoncache", dtype=dtype, **shared
    )
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print in the first process."""
    parser = new_parser("What processes that share a model tell each other about evictions.")
    parser.add_argument("--quick", action="store_true", help="one problem of each task")
    parser.add_argument("--family", choices=sorted(MODELS), default="llama")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["walk", "instr"])
    parser.add_argument("--problems", type=int, default=50, help="of each task")
    parser.add_argument("--budget", type=int, default=96)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    parser.add_argument("--only", nargs="+", metavar="CACHE", help="leave out all others")
    parser.add_argument("--output", type=Path, metavar="CSV")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    machine = Machine.here(SEED)
    dtypes = DTYPES | {"float64": torch.float64}
    model = load(chosen.family, dtypes[chosen.dtype])
    tokenizer = AutoTokenizer.from_pretrained(MODELS[chosen.family])
    count = 1 if chosen.quick else chosen.problems
    problems = [p for t in chosen.tasks for p in make_problems(t, count, SEED, chosen.family)]
    rows = []
    for name, make in caches(chosen.budget).items():
        if name not in (chosen.only or [name]):
            continue
        result = run(model, tokenizer, problems, make)
        # In a run of its own: looking at every operation takes longer than most of them.
        with Traffic() as traffic:
            answer(model, tokenizer, problems[:BATCH], make(model.config))
        rows.append(line(name, result, traffic))
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes == 1 or dist.get_rank() == 0:
        print(show(rows))
        print(
            f"{processes} processes, {len(problems)} problems, {chosen.dtype}, batches of {BATCH}"
        )
        print(machine)
        if chosen.output:
            write_csv(chosen.output, rows)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
