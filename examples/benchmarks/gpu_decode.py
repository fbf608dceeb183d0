"""Tokens per second and memory while decoding on a GPU, against what a user would run instead.

    python -m examples.benchmarks.gpu_decode --shape llama-8b --output results/
    python -m examples.benchmarks.gpu_decode --toy

Models have the shapes of Llama 3.1 8B and Qwen3 14B and random weights; caches are filled with
random keys and values as if a prompt had been read, which is cut to the budget as a prompt would
be. Every decoder takes whole rounds from one eviction to the next, alone on the GPU. `--toy` runs
the same code on a CPU at sizes whose times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from examples.benchmarks.decoders import Compiled, Decoder, NotBuiltError
from examples.benchmarks.gpu import Gpu
from examples.benchmarks.gpu_decoders import BASELINES, DECODERS, FLOORS
from examples.benchmarks.machine import Machine
from examples.benchmarks.options import add_output, new_parser, read_options
from examples.benchmarks.results import write_csv
from examples.benchmarks.workload import Shape, Work, held_bytes
from hf_reasoncache.graphs import CudaRecorder, DecodeGraphs

SHAPES = {
    "llama-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "qwen-14b": Shape(40, 5120, 17408, 40, 8, 128, 151936),
    "toy": Shape(2, 32, 64, 4, 2, 16, 64),
}
GOALS = {(1, 32768): 1.2, (16, 32768): 4.5}
"""Speed over the best baseline, by batch and context."""

THROUGHPUT_GOAL = 10.0
"""Tokens per second at the largest batch that fits, over the best baseline at its own."""


@dataclass(frozen=True)
class Row:
    """One decoder in one case.

    Attributes
    ----------
    shape, batch, context, decoder, kind
    ms : float or None
        Per step: the mean of a round, of which the median of all rounds.
    median_ms, worst_ms : float or None
        Over single steps. The worst one has an eviction.
    tokens_per_second : float or None
    held, peak : int or None
        Bytes of the cache, and the most that the process had allocated.
    recorded, replayed, eager : int or None
        Steps of a decoder with graphs, the warm-up included.
    note : str
    """

    shape: str
    batch: int
    context: int
    decoder: str
    kind: str
    ms: float | None = None
    median_ms: float | None = None
    worst_ms: float | None = None
    tokens_per_second: float | None = None
    held: int | None = None
    peak: int | None = None
    recorded: int | None = None
    replayed: int | None = None
    eager: int | None = None
    note: str = ""

    def __str__(self) -> str:
        case = f"{f'{self.batch}x{self.context}':10}{self.decoder:30}"
        if self.ms is None or self.tokens_per_second is None:
            return f"{case}not run: {self.note[:31]}"
        return (
            f"{case}{self.ms:8.2f}{self.tokens_per_second:10.1f}"
            f"{(self.held or 0) / 1e9:9.3f}{(self.peak or 0) / 1e9:8.2f}"
        )


HEADER = f"{'':40}{'ms/step':>8}{'tokens/s':>10}{'cache GB':>9}{'peak GB':>8}"


@dataclass(frozen=True)
class Options:
    """Everything that a run depends on.

    Attributes
    ----------
    shape : str
    work : Work
    cases : tuple of (int, int)
        Batch and context.
    decoders : tuple of str
    rounds : int
    compile_limit : float
        Seconds.
    largest : int
        The largest batch to try; 0 tries none.
    profiled : tuple of str
        Decoders whose first step of a round is profiled.
    """

    shape: str
    work: Work
    cases: tuple[tuple[int, int], ...]
    decoders: tuple[str, ...]
    rounds: int
    compile_limit: float
    largest: int
    profiled: tuple[str, ...]

    def sized(self, batch: int, context: int) -> Work:
        """Return the work of one case."""
        return replace(self.work, batch=batch, context=context)


@contextmanager
def _new_tensors(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


class Run:
    """What has been measured so far, printed and written after each decoder."""

    def __init__(self, options: Options, output: Path | None, say: Callable[[str], None]) -> None:
        self.options, self.output, self.say = options, output, say
        self.gpu, self.machine = _device(options), Machine.here(options.work.seed)
        self.rows: list[Row] = []
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
        say(f"{self.gpu}\n{self.machine}")
        if not self.gpu.real:
            say("toy sizes on a CPU: the times mean nothing")
        with _new_tensors(options.work.device, options.work.dtype):
            self.model: LlamaForCausalLM = options.work.shape.build(options.work.seed)
        work = options.work
        say(f"{options.shape}, budget {work.budget}, buffer {work.buffer}\n{HEADER}")

    def measure(self, name: str, work: Work) -> Row:
        """Run one decoder alone."""
        kind = DECODERS[name]
        row = Row(self.options.shape, work.batch, work.context, kind.name, kind.__name__)
        if self.gpu.real:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            decoder = self._build(kind, work)
            decoder.warm_up()
            rounds = [list(decoder.round(self.gpu.clock)) for _ in range(self.options.rounds)]
            if name in self.options.profiled:
                self._profile(decoder, f"{decoder.name}, {work.batch}x{work.context}")
        except NotBuiltError as error:
            return replace(row, note=str(error))
        except torch.OutOfMemoryError:
            return replace(row, note="out of memory")
        ms = 1e3 * statistics.median(statistics.mean(steps) for steps in rounds)
        steps = [step for steps in rounds for step in steps]
        row = replace(
            row,
            decoder=decoder.name,
            ms=ms,
            median_ms=1e3 * statistics.median(steps),
            worst_ms=1e3 * max(steps),
            tokens_per_second=1e3 * work.batch / ms,
            held=held_bytes(decoder.cache),
            peak=torch.cuda.max_memory_allocated() if self.gpu.real else None,
            note=decoder.note,
        )
        graphs = decoder.forward
        if isinstance(graphs, DecodeGraphs):
            counts = (graphs.recorded, graphs.replayed, graphs.eager)
            row = replace(row, **dict(zip(("recorded", "replayed", "eager"), counts, strict=True)))
        return row

    def _build(self, kind: type[Decoder], work: Work) -> Decoder:
        if issubclass(kind, Compiled):
            return kind(self.model, work, self.options.compile_limit)
        return kind(self.model, work)

    def _profile(self, decoder: Decoder, title: str) -> None:
        """Append what the first step of a round does, an eviction if the decoder evicts."""
        with torch.profiler.profile() as profile:
            next(decoder.round(self.gpu.clock))
        key = "self_cuda_time_total" if self.gpu.real else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=key, row_limit=25)
        if self.output is not None:
            with (self.output / "gpu_decode_profile.txt").open("a") as file:
                file.write(f"{title}\n{table}\n")

    def note(self, row: Row) -> None:
        """Print a row and write all of them."""
        self.say(str(row))
        self.rows.append(row)
        if self.output is not None:
            work = self.options.work
            columns = self.gpu.row() | {
                "dtype": str(work.dtype),
                "budget": work.budget,
                "buffer": work.buffer,
            }
            write_csv(self.output / "gpu_decode.csv", self.rows, self.machine, **columns)

    def largest(self, name: str) -> Row | None:
        """Double the batch until the memory is full; return the last one that ran."""
        context = self.options.cases[0][1]
        batch = 2 * max(batch for batch, _ in self.options.cases)
        best = None
        while batch <= self.options.largest:
            row = self.measure(name, self.options.sized(batch, context))
            if row.ms is None:
                break
            best, batch = row, 2 * batch
        return best


def judge(rows: Sequence[Row], goal: float | None, what: str) -> str:
    """Hold our best decoder against the best baseline."""
    names = {kind.__name__ for kind in BASELINES.values()}
    speed = {True: 0.0, False: 0.0}
    for row in rows:
        baseline = row.kind in names
        speed[baseline] = max(speed[baseline], row.tokens_per_second or 0.0)
    if not speed[True] or not speed[False]:
        return f"{what}: not measured"
    ratio = speed[False] / speed[True]
    if goal is None:
        return f"{what}: {ratio:.2f}x"
    return f"{what}: {ratio:.2f}x (goal >= {goal:g}, {'met' if ratio >= goal else 'missed'})"


@torch.no_grad()
def run(options: Options, output: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Measure, print, and write `gpu_decode.csv` after each decoder."""
    run = Run(options, output, say)
    timed = [name for name in options.decoders if name not in FLOORS]
    for batch, context in options.cases:
        before = len(run.rows)
        for name in options.decoders:
            run.note(run.measure(name, options.sized(batch, context)))
        if run.gpu.real:
            floors = {kind.__name__ for kind in FLOORS.values()}
            found = [row for row in run.rows[before:] if row.kind not in floors]
            what = f"{batch}x{context}, over the best baseline"
            say(judge(found, GOALS.get((batch, context)), what))
    if options.largest:
        found = [row for row in map(run.largest, timed) if row is not None]
        for row in found:
            run.note(row)
        if run.gpu.real:
            say(judge(found, THROUGHPUT_GOAL, "largest batches, over the best baseline"))
    return run.rows


def _device(options: Options) -> Gpu:
    if options.work.device == "cuda":
        return Gpu.here()
    return Gpu.of(torch.device("cpu"), "none (toy sizes)")


def _cases(text: str) -> tuple[tuple[int, int], ...]:
    try:
        pairs = [tuple(int(number) for number in case.split("x")) for case in text.split(",")]
        return tuple((batch, context) for batch, context in pairs)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected BATCHxCONTEXT, comma-separated, got {text!r}; for example 1x32768,16x8192"
        ) from error


def _decoders(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    if unknown := set(names) - set(DECODERS):
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(DECODERS)}, got {','.join(sorted(unknown))}"
        )
    return names


def parse(arguments: Sequence[str] | None) -> tuple[Options, Path | None]:
    """Read the command line."""
    parser = new_parser("Tokens per second and memory while decoding on a GPU.")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument(
        "--cases",
        type=_cases,
        default="1x32768,16x8192",
        help="batch x tokens of the prompt, comma-separated; 16x32768 takes 85 GB",
    )
    names = ",".join(DECODERS)
    parser.add_argument("--decoders", type=_decoders, default=names, help="comma-separated")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32, help="steps per round at full context")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--compile-limit",
        type=float,
        default=120,
        help="seconds for torch.compile; 0 leaves it out",
    )
    parser.add_argument(
        "--largest",
        type=int,
        default=256,
        help="double the batch at the first context until the memory is full, or up to this; "
        "0 leaves it out",
    )
    parser.add_argument("--profile", type=_decoders, default="", help="profile a step of these")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser, "folder for gpu_decode.csv")
    chosen = read_options(
        parser,
        arguments,
        "toy",
        shape="toy",
        cases="1x48,2x48",
        budget=16,
        buffer=4,
        steps=2,
        rounds=1,
        compile_limit=0,
        largest=4,
    )
    work = Work(
        context=chosen.cases[0][1],
        batch=1,
        dtype=torch.float32 if chosen.toy else torch.bfloat16,
        budget=chosen.budget,
        buffer=chosen.buffer,
        steps=chosen.steps,
        seed=chosen.seed,
        shape=SHAPES[chosen.shape],
        device="cpu" if chosen.toy else "cuda",
        recorder=None if chosen.toy else CudaRecorder,
    )
    options = Options(
        shape=chosen.shape,
        work=work,
        cases=chosen.cases,
        decoders=chosen.decoders,
        rounds=chosen.rounds,
        compile_limit=chosen.compile_limit,
        largest=chosen.largest,
        profiled=chosen.profile,
    )
    return options, chosen.output


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options, output = parse(arguments)
    run(options, output, print)


if __name__ == "__main__":
    main()
