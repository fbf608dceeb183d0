"""Time per token of a model with latents, against `DynamicCache`, which expands all of them.

    python -m examples.benchmarks.latents --threads 1 --clock cpu --output results/
    python -m examples.benchmarks.latents --quick

A random model of the widths of DeepSeek-V2-Lite, in 8 layers: hidden 2048, 16 heads, latents of 512
numbers with rotary keys of 64, heads of 128 + 64 and values of 128. Its MLP is as wide as what a
token runs through there (six experts and two shared ones). Caches are filled and take turns as in
`cpu_decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from examples.benchmarks.decoders import Compressed, Decoder, Holds, NoCache, Uncompressed
from examples.benchmarks.machine import Machine
from examples.benchmarks.options import (
    CLOCKS,
    add_common,
    add_output,
    dtypes_of,
    new_parser,
    read_options,
)
from examples.benchmarks.results import Block, Row, write_csv
from examples.benchmarks.turns import time_rounds, timed
from examples.benchmarks.workload import DTYPES, Shape, Work

GOAL = 5.0
"""Speed of `budget=None` over DynamicCache at 8k tokens."""


@dataclass(frozen=True)
class LatentShape(Shape):
    """Sizes of the random model; `head_size` is that of the keys' part without rotation."""

    layers: int = 8
    hidden: int = 2048
    intermediate: int = 11264
    query_heads: int = 16
    kv_heads: int = 1
    head_size: int = 128
    rank: int = 512
    rope: int = 64

    def __str__(self) -> str:
        return (
            f"random DeepSeek-V2: {self.layers} layers, hidden {self.hidden}, {self.query_heads} "
            f"heads, latents of {self.rank}\nand rotary keys of {self.rope}"
        )

    @property
    def widths(self) -> tuple[int, int, int]:
        """See `Shape.widths`."""
        return 1, self.rank, self.rope

    @property
    def scaling(self) -> float:
        """See `Shape.scaling`."""
        return (self.head_size + self.rope) ** -0.5

    def held(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Shape.held`: rotary keys lie behind the latents."""
        both = torch.cat([keys, values], dim=-1)
        return both, both[..., : self.rank]

    def build(self, seed: int) -> DeepseekV2ForCausalLM:
        """See `Shape.build`."""
        torch.manual_seed(seed)
        config = DeepseekV2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            first_k_dense_replace=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.query_heads,
            q_lora_rank=None,
            kv_lora_rank=self.rank,
            qk_nope_head_dim=self.head_size,
            qk_rope_head_dim=self.rope,
            v_head_dim=self.head_size,
            max_position_embeddings=1 << 20,
        )
        return DeepseekV2ForCausalLM(config).eval()

    def kv_bytes(self, tokens: int, batch: int, dtype: torch.dtype) -> int:
        """See `Shape.kv_bytes`."""
        return batch * tokens * (self.rank + self.rope) * dtype.itemsize


@dataclass(frozen=True)
class Options:
    """Everything that a run depends on."""

    shape: LatentShape
    contexts: tuple[int, ...]
    dtypes: tuple[str, ...]
    batch: int
    budget: int
    buffer: int
    steps: int
    rounds: int
    clock: str
    seed: int
    goals: bool


def measure(model: DeepseekV2ForCausalLM, options: Options, dtype: str, context: int) -> Block:
    """Run all decoders of one configuration in turns."""
    work = Work(
        context=context,
        batch=options.batch,
        dtype=DTYPES[dtype],
        budget=options.budget,
        buffer=options.buffer,
        steps=options.steps,
        seed=options.seed,
        shape=options.shape,
    )
    decoders: list[Decoder] = []
    for kind in (Decoder, Uncompressed, Compressed, Holds, NoCache):
        decoders.append(kind(model, work))
        decoders[-1].warm_up()
    seconds = time_rounds(decoders, options.rounds, CLOCKS[options.clock])
    rows = []
    for each in decoders:
        row = Row(dtype, options.batch, context, each.name, type(each).__name__)
        rows.append(timed(row, each, seconds[each.name]))
    return Block(tuple(rows))


@torch.no_grad()
def run(options: Options, say: Callable[[str], None], output: Path | None) -> None:
    """Measure, print, and write the file."""
    machine = Machine.here(options.seed)
    say(str(machine))
    say(
        f"{options.shape}; budget {options.budget}, buffer {options.buffer}; "
        f"{options.rounds} rounds, {options.clock} time"
    )
    blocks = []
    for dtype in options.dtypes:
        model = options.shape.build(options.seed).to(DTYPES[dtype])
        for context in options.contexts:
            block = measure(model, options, dtype, context)
            say("\n" + block.table())
            ratio = block.ratio("Decoder", "Uncompressed")
            if options.goals and ratio is not None and context >= 8192:
                met = "met" if ratio >= GOAL else "missed"
                say(f"  budget=None over DynamicCache: {ratio:.1f}, >= {GOAL:g} {met}")
            blocks.append(block)
    if output is not None:
        rows = [row for block in blocks for row in block.rows]
        settings = dict(clock=options.clock, budget=options.budget, buffer=options.buffer)
        write_csv(output / "latents.csv", rows, machine, **settings)
        say(f"\nwrote latents.csv to {output}")


def parse(arguments: Sequence[str] | None) -> tuple[Options, Path | None]:
    """Read the command line: the options, and where the file goes."""
    parser = new_parser("Time per token of a model with latents.")
    add_common(parser)
    parser.add_argument("--contexts", default="2048,8192", help="tokens, comma-separated")
    parser.add_argument("--dtypes", default="float32", help="comma-separated")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=11264)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--buffer", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="steps per round at full context")
    parser.add_argument("--rounds", type=int, default=3)
    add_output(parser, "folder for the CSV")
    chosen = read_options(
        parser,
        arguments,
        contexts="96",
        layers=2,
        hidden=64,
        intermediate=64,
        budget=48,
        buffer=16,
        rounds=2,
    )
    options = Options(
        shape=LatentShape(
            layers=chosen.layers, hidden=chosen.hidden, intermediate=chosen.intermediate
        ),
        contexts=tuple(int(each) for each in chosen.contexts.split(",")),
        dtypes=dtypes_of(parser, chosen.dtypes),
        batch=chosen.batch,
        budget=chosen.budget,
        buffer=chosen.buffer,
        steps=chosen.steps,
        rounds=chosen.rounds,
        clock=chosen.clock,
        seed=chosen.seed,
        goals=not chosen.quick,
    )
    return options, chosen.output


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options, output = parse(arguments)
    run(options, print, output)


if __name__ == "__main__":
    main()
