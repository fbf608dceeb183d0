"""Tokens per second and memory while decoding on a GPU, against what a user would run instead.

    python -m examples.benchmarks.gpu_decode --shape llama-8b --output results/
    python -m examples.benchmarks.gpu_decode --toy

Models have the shapes of Llama 3.1 8B and Qwen3 14B and random weights; caches are filled with
random keys and values as if a prompt had been read, which is cut to the budget as a prompt would
be. Every arm takes whole rounds from one eviction to the next, alone on the GPU. `--toy` runs the
same code on a CPU at sizes whose times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from examples.benchmarks.arms import Arm, Compiled, Compressed, NoCache, NotBuiltError, Uncompressed
from examples.benchmarks.gpu import Gpu
from examples.benchmarks.machine import Machine
from examples.benchmarks.results import write_csv
from examples.benchmarks.workload import Shape, Work, held_bytes
from hf_reasoncache.graphs import CudaRecorder, DecodeGraphs

SHAPES = {
    "llama-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "qwen-14b": Shape(40, 5120, 17408, 40, 8, 128, 151936),
    "toy": Shape(2, 32, 64, 4, 2, 16, 64),
}
COMPILE_LIMIT = 900.0
GOALS = {1: 1.2, 16: 4.5}
"""Speed over the best baseline, by batch."""

THROUGHPUT_GOAL = 10.0
"""Tokens per second at the largest batch that fits, over the best baseline at its own."""


class Flash(Arm):
    """`DynamicCache` with the flash attention 2 package."""

    name = "DynamicCache + flash 2"
    attention = "flash_attention_2"

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        if importlib.util.find_spec("flash_attn") is None:
            raise NotBuiltError("flash_attn is not installed")
        super().__init__(model, work)


class Static(Compiled):
    """`StaticCache` compiled as transformers compiles it for `generate`."""

    mode = "reduce-overhead"

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        super().__init__(model, work, COMPILE_LIMIT if work.device == "cuda" else 0.0)


def _graphs(arm: Arm) -> DecodeGraphs:
    if arm.work.device != "cuda":
        raise NotBuiltError("CUDA graphs need a GPU")
    return DecodeGraphs(arm.model, arm.cache, CudaRecorder())


class UncompressedGraphs(Uncompressed):
    """Our cache without a budget, steps from CUDA graphs."""

    name = "budget=None, graphs"

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        super().__init__(model, work)
        self.forward = _graphs(self)


class CompressedGraphs(Compressed):
    """Our cache with a budget, steps from CUDA graphs between evictions."""

    name = "with a budget, graphs"

    def __init__(self, model: LlamaForCausalLM, work: Work) -> None:
        super().__init__(model, work)
        self.name = f"budget={work.budget}, graphs"
        self.forward = _graphs(self)


BASELINES = (Arm, Flash, Static)
OURS = (UncompressedGraphs, Compressed, CompressedGraphs)


@dataclass(frozen=True)
class Row:
    """One arm at one batch; memory in bytes, of which `peak` counts all of the process."""

    shape: str
    batch: int
    context: int
    arm: str
    kind: str
    ms: float | None = None
    tokens_per_second: float | None = None
    held: int | None = None
    peak: int | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.ms is None or self.tokens_per_second is None:
            return f"{self.batch:5d}  {self.arm:29}  not run: {self.note}"
        return (
            f"{self.batch:5d}  {self.arm:29}{self.ms:10.2f}{self.tokens_per_second:12.1f}"
            f"{(self.held or 0) / 1e9:10.3f}{(self.peak or 0) / 1e9:10.2f}"
        )


HEADER = f"{'batch':7}{'':29}{'ms/step':>10}{'tokens/s':>12}{'cache GB':>10}{'peak GB':>10}"


@dataclass(frozen=True)
class Plan:
    """Everything that a run depends on."""

    shape: str
    work: Work
    batches: tuple[int, ...]
    rounds: int
    largest: bool


@contextmanager
def _new_tensors(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def measure(kind: type[Arm], model: LlamaForCausalLM, plan: Plan, work: Work, gpu: Gpu) -> Row:
    """Run one arm alone."""
    row = Row(plan.shape, work.batch, work.context, getattr(kind, "name", ""), kind.__name__)
    if gpu.real:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        arm = kind(model, work)
        arm.warm_up()
        rounds = [list(arm.round(gpu.clock)) for _ in range(plan.rounds)]
    except NotBuiltError as error:
        return replace(row, note=str(error))
    except torch.OutOfMemoryError:
        return replace(row, note="out of memory")
    ms = 1e3 * statistics.median(statistics.mean(steps) for steps in rounds)
    return replace(
        row,
        arm=arm.name,
        ms=ms,
        tokens_per_second=1e3 * work.batch / ms,
        held=held_bytes(arm.cache),
        peak=torch.cuda.max_memory_allocated() if gpu.real else None,
        note=arm.note,
    )


def largest(kind: type[Arm], model: LlamaForCausalLM, plan: Plan, gpu: Gpu) -> Row | None:
    """Double the batch until the memory is full; return the last one that ran."""
    best, batch = None, 2 * max(plan.batches)
    while True:
        row = measure(kind, model, plan, replace(plan.work, batch=batch), gpu)
        if row.ms is None:
            return best
        best, batch = row, 2 * batch
        if not gpu.real:
            return best


def judge(rows: Sequence[Row], goal: float, what: str) -> str:
    """Hold our best arm against the best baseline."""
    names = {kind.__name__ for kind in BASELINES}
    speed = {True: 0.0, False: 0.0}
    for row in rows:
        baseline = row.kind in names
        speed[baseline] = max(speed[baseline], row.tokens_per_second or 0.0)
    if not speed[True] or not speed[False]:
        return f"{what}: not measured"
    ratio = speed[False] / speed[True]
    return f"{what}: {ratio:.2f}x (goal >= {goal:g}, {'met' if ratio >= goal else 'missed'})"


@torch.no_grad()
def run(plan: Plan, output: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Measure, print, and write `gpu_decode.csv` after each batch."""
    gpu, machine = _device(plan), Machine.here(plan.work.seed)
    say(f"{gpu.gpu}, CUDA {gpu.cuda}, triton {gpu.triton}, {gpu.date}\n{machine}")
    if not gpu.real:
        say("toy sizes on a CPU: the times mean nothing")
    with _new_tensors(plan.work.device, plan.work.dtype):
        model = plan.work.shape.build(plan.work.seed)
    work, rows = plan.work, []
    say(f"{plan.shape}, {work.context} tokens, budget {work.budget}\n{HEADER}")

    def note(row: Row | None) -> list[Row]:
        found = [] if row is None else [row]
        for each in found:
            say(str(each))
        rows.extend(found)
        if output is not None and rows:
            output.mkdir(parents=True, exist_ok=True)
            columns = gpu.row() | {"dtype": str(work.dtype), "budget": work.budget}
            write_csv(output / "gpu_decode.csv", rows, machine, **columns)
        return found

    for batch in plan.batches:
        at = replace(work, batch=batch)
        found = [
            each
            for kind in (*BASELINES, *OURS, NoCache)
            for each in note(measure(kind, model, plan, at, gpu))
        ]
        if gpu.real and batch in GOALS:
            timed = [row for row in found if row.kind != NoCache.__name__]
            say(judge(timed, GOALS[batch], f"batch {batch}, over the best baseline"))
    if plan.largest:
        found = [
            each
            for kind in (*BASELINES, CompressedGraphs if gpu.real else Compressed)
            for each in note(largest(kind, model, plan, gpu))
        ]
        if gpu.real:
            say(judge(found, THROUGHPUT_GOAL, "largest batches, over the best baseline"))
    return rows


def _device(plan: Plan) -> Gpu:
    if plan.work.device == "cuda":
        return Gpu.here()
    return Gpu.of(torch.device("cpu"), "none (toy sizes)")


def parse(arguments: Sequence[str] | None) -> tuple[Plan, Path | None]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Tokens per second and memory while decoding on a GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument("--context", type=int, default=32768, help="tokens of the prompt")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--batches", default="1,16", help="comma-separated")
    parser.add_argument("--steps", type=int, default=32, help="steps per round at full context")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-largest", action="store_true", help="leave the largest batch out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for gpu_decode.csv")
    chosen = parser.parse_args(arguments)
    if chosen.toy:
        parser.set_defaults(
            shape="toy", context=48, budget=16, buffer=4, batches="1", steps=2, rounds=1
        )
        chosen = parser.parse_args(arguments)
    work = Work(
        context=chosen.context,
        batch=1,
        dtype=torch.float32 if chosen.toy else torch.bfloat16,
        budget=chosen.budget,
        buffer=chosen.buffer,
        steps=chosen.steps,
        seed=chosen.seed,
        shape=SHAPES[chosen.shape],
        device="cpu" if chosen.toy else "cuda",
    )
    batches = tuple(int(batch) for batch in chosen.batches.split(","))
    plan = Plan(chosen.shape, work, batches, chosen.rounds, not chosen.no_largest)
    return plan, chosen.output


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    plan, output = parse(arguments)
    run(plan, output, print)


if __name__ == "__main__":
    main()
