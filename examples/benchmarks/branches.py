"""Time per step and bytes held while N branches of one prompt decode on a CPU.

    python -m examples.benchmarks.branches --threads 1 --clock cpu --output results/
    python -m examples.benchmarks.branches --quick

A random Llama (hidden 512, 32 query and 8 KV heads of size 64) decodes one token per branch and
step. DynamicCache and our pool hold the prompt once per branch, `SharedBranchCache` once in all.
The caches are filled with random keys and values and take turns, a few steps each, so that whatever
else the machine does falls on all of them. transformers' continuous batching, which shares full
blocks of a prompt between its branches, has no step that could take turns: it generates few and
some more tokens in the same run, and the difference is what a step costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from examples.benchmarks.decoders import Decoder, NoCache, NotBuiltError, Uncompressed
from examples.benchmarks.machine import Machine
from examples.benchmarks.options import CLOCKS, add_common, add_output, new_parser, read_options
from examples.benchmarks.results import MB, Block, Row, draw, write_csv
from examples.benchmarks.turns import time_rounds, timed
from examples.benchmarks.workload import DTYPES, Shape, Work
from hf_reasoncache import SharedBranchCache

GOALS = {4: 2.0, 16: 3.5, 64: 4.0}
"""Speed over DynamicCache with as many rows, at a prompt of 2k tokens."""

PAGE = 32
"""Tokens per block of continuous batching."""


@dataclass(frozen=True)
class Options:
    """Everything that a run depends on."""

    shape: Shape
    prompts: tuple[int, ...]
    branches: tuple[int, ...]
    own: int
    dtype: str
    steps: int
    rounds: int
    memory: float
    continuous_limit: int
    clock: str
    seed: int

    def work(self, prompt: int, branches: int) -> Work:
        """One configuration; branches have written `own` tokens when the clock starts."""
        return Work(
            context=prompt + self.own,
            batch=branches,
            dtype=DTYPES[self.dtype],
            budget=0,
            buffer=0,
            steps=self.steps,
            seed=self.seed,
            shape=self.shape,
        )


class Shared(Decoder):
    """The prompt in memory once, and read once per step for all branches."""

    name = "SharedBranchCache"
    attention = "reasoncache"

    def __init__(self, model: LlamaForCausalLM, work: Work, own: int) -> None:
        self.own = own
        super().__init__(model, work)
        model.set_attn_implementation(self.attention)
        for token in self._draw(own):
            self._step(token)

    def _make_cache(self) -> SharedBranchCache:
        cache = SharedBranchCache(self.model.config)
        cache.reserve(self.own + self.work.steps)
        replace(self.work, batch=1).fill(cache, self.work.context - self.own)
        cache.batch_repeat_interleave(self.work.batch)
        return cache

    def _undo(self) -> None:
        """Compare the memory with its ideal when the text is longest, and take the steps back."""
        tokens = self.work.context - self.own + self.work.batch * (self.own + self.steps)
        ideal = self.work.shape.layers * self.work.shape.kv_bytes(tokens, 1, self.work.dtype)
        held = self.cache.report().kv_bytes
        self.note = f"keys and values {100 * (held / ideal - 1):.2f}% above prefix and suffixes"
        super()._undo()


def continuous_ms(
    model: LlamaForCausalLM, options: Options, prompt: int, branches: int
) -> tuple[float, int]:
    """Milliseconds per step of continuous batching, and bytes of its blocks.

    Raises
    ------
    NotBuiltError
        If it does not run.
    """
    if prompt * branches > options.continuous_limit:
        raise NotBuiltError(f"left out above {options.continuous_limit} tokens in all rows")
    ids = torch.randint(options.shape.vocabulary, (prompt,)).tolist()
    model.set_attn_implementation("sdpa")
    last = 2 + options.steps
    # Shared full blocks, and for each branch the rest of the prompt and its own tokens.
    blocks = prompt // PAGE + branches * (1 + -(-(last + prompt % PAGE) // PAGE))
    clock, seconds = CLOCKS[options.clock], []
    for tokens in (2, last):
        start = clock()
        found = model.generate_batch(
            inputs=[ids],
            generation_config=GenerationConfig(
                max_new_tokens=tokens,
                do_sample=True,
                num_return_sequences=branches,
                eos_token_id=-1,
                pad_token_id=0,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE, num_blocks=blocks, max_batch_tokens=max(prompt, branches)
            ),
            warmup=False,
        )
        seconds.append(clock() - start)
        done = [len(each.generated_tokens) for each in found.values()]
        errors = {each.error for each in found.values() if each.error}
        if done != [tokens] * branches:
            raise NotBuiltError(f"expected {branches} x {tokens} tokens, got {done}: {errors}")
    held = options.shape.layers * options.shape.kv_bytes(blocks * PAGE, 1, DTYPES[options.dtype])
    return 1e3 * (seconds[1] - seconds[0]) / options.steps, held


def measure(model: LlamaForCausalLM, options: Options, prompt: int, branches: int) -> Block:
    """Run all decoders of one configuration."""
    work = options.work(prompt, branches)
    rows: dict[str, Row] = {}
    decoders: list[Decoder] = []
    for kind in (Decoder, Uncompressed, Shared, NoCache):
        row = Row(options.dtype, branches, prompt, kind.name, kind.__name__)
        rows[kind.__name__] = row
        needed = options.shape.layers * options.shape.kv_bytes(work.context, branches, work.dtype)
        if kind in (Decoder, Uncompressed) and needed > options.memory * 1e9:
            note = f"needs {needed / 1e9:.1f} GB, --memory is {options.memory:g}"
            rows[kind.__name__] = replace(row, note=note)
            continue
        decoder = kind(model, work, options.own) if kind is Shared else kind(model, work)
        decoder.warm_up()
        decoders.append(decoder)
    seconds = time_rounds(decoders, options.rounds, CLOCKS[options.clock])
    for decoder in decoders:
        name = type(decoder).__name__
        rows[name] = timed(rows[name], decoder, seconds[decoder.name])
    decoders.clear()
    other = Row(options.dtype, branches, prompt, "continuous batching", "Continuous")
    try:
        ms, held = continuous_ms(model, options, prompt, branches)
        other = replace(
            other, ms=ms, ms_low=ms, ms_high=ms, held_bytes=held, note="one difference of two runs"
        )
    except Exception as error:
        # Whatever it raises on this machine, the table quotes it.
        other = replace(other, note=f"{type(error).__name__}: {error}"[:200])
    order = (rows["Decoder"], rows["Uncompressed"], other, rows["Shared"], rows["NoCache"])
    return Block(order)


def summary(block: Block, options: Options) -> list[str]:
    """Tokens per second of our decoder, its memory, and the goal."""
    shared = next(row for row in block.rows if row.kind == "Shared")
    lines = [f"  {shared.batch / shared.ms * 1e3:.1f} tokens/s; {shared.note}"]
    found, goal = block.ratio("Decoder", "Shared"), GOALS.get(shared.batch)
    if found is not None and goal is not None and shared.context == 2048:
        verdict = "met" if found >= goal else "missed"
        lines.append(f"  over DynamicCache {found:.2f}x, goal {goal:g}x: {verdict}")
    return lines


@torch.no_grad()
def run(options: Options, say: Callable[[str], None], output: Path | None) -> None:
    """Measure, print, and write the files."""
    machine = Machine.here(options.seed)
    say(str(machine))
    say(
        f"{options.shape}; {options.own} own tokens per branch; {options.rounds} rounds of "
        f"{options.steps} steps, {options.clock} time"
    )
    model = options.shape.build(options.seed).to(DTYPES[options.dtype])
    model.generation_config.eos_token_id = None
    blocks: list[Block] = []
    for prompt in options.prompts:
        for branches in options.branches:
            start = time.perf_counter()
            block = measure(model, options, prompt, branches)
            blocks.append(block)
            took = f"  measured in {time.perf_counter() - start:.0f} s"
            say("\n".join(["", block.table(), *summary(block, options), took]))
            if output is not None:
                rows = [row for each in blocks for row in each.rows]
                columns = {"own": options.own, "steps": options.steps, "clock": options.clock}
                write_csv(output / "branches.csv", rows, machine, **columns)
                draw(output / "branches.png", blocks, machine, options.clock)
    if output is not None:
        say(f"\nwrote {output / 'branches.csv'} and {output / 'branches.png'}")
    say(f"(1 MB is {MB:,.0f} bytes; batch is the number of branches, context the prompt)")


def parse(arguments: Sequence[str] | None) -> tuple[Options, Path | None]:
    """Read the command line: the options, and where files go."""
    parser = new_parser("Time per step and bytes held while branches of a prompt decode on a CPU.")
    add_common(parser)
    parser.add_argument("--prompts", default="2048,8192", help="tokens, comma-separated")
    parser.add_argument("--branches", default="4,16,64", help="comma-separated")
    parser.add_argument("--own", type=int, default=32, help="tokens that a branch has written")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps per round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--memory", type=float, default=6, help="GB that one cache may take; others are left out"
    )
    parser.add_argument(
        "--continuous-limit",
        type=int,
        default=33_000,
        help="prompt tokens times branches up to which continuous batching is run",
    )
    add_output(parser, "folder for CSV and PNG")
    tiny = {"prompts": "96", "branches": "2,3", "own": 3, "layers": 2, "steps": 4, "rounds": 2}
    chosen = read_options(parser, arguments, **tiny)
    options = Options(
        shape=Shape(layers=chosen.layers),
        prompts=tuple(int(each) for each in chosen.prompts.split(",")),
        branches=tuple(int(each) for each in chosen.branches.split(",")),
        own=chosen.own,
        dtype=chosen.dtype,
        steps=chosen.steps,
        rounds=chosen.rounds,
        memory=chosen.memory,
        continuous_limit=chosen.continuous_limit,
        clock=chosen.clock,
        seed=chosen.seed,
    )
    return options, chosen.output


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options, output = parse(arguments)
    run(options, print, output)


if __name__ == "__main__":
    main()
