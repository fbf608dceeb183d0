"""Why windows lose what they lose: which tokens of a window are looked at again, and which stay.

    python -m examples.research.window_recall --family llama --task chain

A tiny reasoner reads reference solutions with the full cache. A token is *needed* by a head if,
after its window has been compressed, a query pays it at least half of its attention. Printed is the
share of the needed tokens that each way to choose would have kept. `oracle` chooses by the
attention to come. With `--generate`, the cache makes some of these choices, problem by problem.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase

from examples.research.arguments import parse, parser
from examples.research.compare_windows import RECENT, WINDOW
from examples.research.harness import run_spec
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, TASKS, Problem, make_problems
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache import SlidingWindowCompressCache
from hf_reasoncache.evaluation import CacheSpec, Share
from hf_reasoncache.policies.token2chunk import token2chunk
from hf_reasoncache.scorers import Bidirectional, Random, Scorer, SnapKV
from hf_reasoncache.scorers.base import HeldTokens

ATTENTION = "window_recall"
NEEDED = 0.5
"""Share of a query's attention that makes a token needed."""
AGES = {"<64": (0, 64), "64-127": (64, 128), "128+": (128, 1 << 30)}
"""Tokens between a window and the query that needs one of it."""


@dataclass
class Reading:
    """What every layer saw while it read one text; an attention function fills it."""

    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    mass: dict[int, torch.Tensor] = field(default_factory=dict)
    scaling: float = 1.0

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend causally in one sequence: queries `[1, H, T, D]`, keys `[1, H_kv, T, D]`."""
        grouped = query.unflatten(1, (key.shape[1], -1))
        logits = (grouped @ key[:, :, None].mT) * scaling
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        mass = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        layer, self.scaling = int(module.layer_idx), scaling
        self.queries[layer], self.keys[layer], self.mass[layer] = grouped, key, mass[0]
        return (mass @ value[:, :, None]).flatten(1, 2).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Oracle(Scorer):
    """Attention that the queries after a window's compaction pay to its tokens, in one text."""

    reading: Reading

    def score(self, held: HeldTokens) -> torch.Tensor:
        """Sum over the queries to come, as the full cache sees them."""
        mass = self.reading.mass[held.layer][:, :, int(held.length[0]) + RECENT :].sum((1, 2))
        # The text that is generated may become longer than the one that was read.
        mass = torch.nn.functional.pad(mass, (0, 1))
        return mass.gather(-1, held.positions[0].clamp(0, mass.shape[-1] - 1))[None]


@dataclass(frozen=True)
class Shared(Scorer):
    """Random tokens, the same ones in all heads of a layer."""

    def score(self, held: HeldTokens) -> torch.Tensor:
        """The numbers of the first head."""
        return Random().score(held)[:, :1].expand(held.positions.shape)


Choice = tuple[Callable[[Reading], Scorer], float]
CHOICES: dict[str, Choice] = {
    "oracle, tokens": (Oracle, 0.0),
    "oracle, chunks": (Oracle, 0.5),
    "bidirectional, tokens": (lambda _: Bidirectional(WINDOW), 0.0),
    "bidirectional, chunks": (lambda _: Bidirectional(WINDOW), 0.5),
    "causal, tokens": (lambda _: SnapKV(queries=WINDOW, kernel=1), 0.0),
    "causal, chunks": (lambda _: SnapKV(queries=WINDOW, kernel=1), 0.5),
    "random, tokens": (lambda _: Random(), 0.0),
    "random, heads alike": (lambda _: Shared(), 0.0),
}
"""Scorers, made from a reading, and shares of chunks."""


def windows(begin: int, end: int, layer: int, layers: int) -> Iterator[tuple[int, int]]:
    """Yield from and to of the windows that SlidingWindowCompressCache compresses in a text."""
    phase = layer * WINDOW // layers
    while (stop := begin + WINDOW - (begin - phase) % WINDOW) + RECENT < end:
        yield begin, stop
        begin = stop


def describe(reading: Reading, layer: int, low: int, high: int) -> HeldTokens:
    """A window as the cache shows it to a scorer."""
    keys, heads = reading.keys[layer][:, :, low:high], reading.keys[layer].shape[1]
    places = torch.arange(low, high)
    return HeldTokens(
        keys=keys,
        positions=places.expand(1, heads, -1),
        valid=torch.ones(1, heads, high - low, dtype=torch.bool),
        length=torch.tensor([high]),
        scaling=reading.scaling,
        layer=layer,
        load_values=lambda: keys,
        queries=reading.queries[layer][:, :, :, low:high],
        query_positions=places[None],
    )


class Tally:
    """Counts needed tokens and those that were kept; marks the texts that lost none."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], int] = defaultdict(int)
        self.all: dict[tuple[str, str], int] = defaultdict(int)
        self.whole: dict[tuple[str, str], list[bool]] = defaultdict(list)  # a mark per text

    def add(self, name: str, column: str, needed: torch.Tensor, keep: torch.Tensor) -> None:
        """Count BoolTensors of one shape."""
        self.kept[name, column] += int((needed & keep).sum())
        self.all[name, column] += int(needed.sum())

    def begin_text(self, layers: int) -> None:
        """No layer has lost a token of the text that follows."""
        for name in CHOICES:
            for layer in range(layers):
                self.whole[name, f"{layer}"].append(True)

    def percent(self, name: str, column: str) -> float:
        """Share of the needed tokens that were kept."""
        return 100 * self.kept[name, column] / max(1, self.all[name, column])

    def whole_percent(self, name: str, column: str) -> float:
        """Share of the texts of which no needed token was lost."""
        return 100 * Share.of(self.whole[name, column]).value


def count(reading: Reading, prompt: int, ratio: float, tally: Tally) -> None:
    """Let every choice compress the windows of one text."""
    tally.begin_text(len(reading.mass))
    for layer, mass in reading.mass.items():
        for low, high in windows(prompt, mass.shape[-1], layer, len(reading.mass)):
            later = mass[:, :, high + RECENT :, low:high] >= NEEDED
            needed = later.any(1).any(1)
            heads = len(needed)
            kept = round(ratio * WINDOW)
            kept = high * kept // WINDOW - low * kept // WINDOW
            held = describe(reading, layer, low, high)
            for name, (make, chunks) in CHOICES.items():
                budgets = torch.full((1, heads), kept)
                keep = token2chunk(make(reading).score(held), held.valid, budgets, chunks)[0]
                shared = keep.any(0).expand(heads, -1)
                for column, held_by in ((f"{layer}", keep), ("all", keep), ("any", shared)):
                    tally.add(name, column, needed, held_by)
                tally.whole[name, f"{layer}"][-1] &= not bool((needed & ~shared).any())
                for age, (near, far) in AGES.items():
                    some = later[:, :, max(0, near - RECENT) : far - RECENT].any(1).any(1)
                    tally.add(name, age, some, keep)


def table(names: Sequence[str], columns: Sequence[str], value: Callable[[str, str], float]) -> str:
    """Percentages, a line per name."""
    lines = [f"{'percent':22}" + "".join(f"{column:>{_width(column)}}" for column in columns)]
    for name in names:
        lines.append(f"{name:22}" + "".join(f"{value(name, c):{_width(c)}.0f}" for c in columns))
    return "\n".join(lines)


def _width(column: str) -> int:
    return max(5, len(column) + 1)


@torch.inference_mode()
def read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problem: Problem
) -> tuple[Reading, int]:
    """Return what the layers see of a reference solution, and the tokens of its prompt."""
    reading = Reading()
    AttentionInterface.register(ATTENTION, reading.attend)
    model.set_attn_implementation(ATTENTION)
    ids = tokenizer(f"{problem.prompt} {problem.solution}", return_tensors="pt")["input_ids"]
    model(input_ids=ids, use_cache=False)
    return reading, len(problem.prompt.split())


def main() -> None:
    """Read, count, print."""
    made = parser(__doc__, "windows.md", problems=50)
    made.add_argument("--task", choices=TASKS, default="chain")
    made.add_argument("--ratio", type=float, default=0.3)
    made.add_argument("--seed", type=int, default=DEVELOPMENT_SEEDS[100])
    made.add_argument(
        "--generate", nargs="+", choices=CHOICES, default=[], help="answer the problems, too (slow)"
    )
    arguments = parse(made)
    model, tokenizer = load(MODELS[arguments.family])
    problems = make_problems(arguments.task, arguments.problems, arguments.seed, arguments.family)
    tally, correct = Tally(), defaultdict(list)
    for problem in tqdm(problems, unit="problem"):
        reading, prompt = read(model, tokenizer, problem)
        count(reading, prompt, arguments.ratio, tally)
        for name in arguments.generate:
            make, chunks = CHOICES[name]
            settings = {"scorer": make(reading), "chunk_share": chunks}
            settings |= {"window": WINDOW, "recent": RECENT}
            spec = CacheSpec(name, SlidingWindowCompressCache, settings)
            run = run_spec(model, tokenizer, [problem], spec, arguments.ratio)
            correct[name].append(run.outcomes[0].correct)
    config = model.config
    layers = [f"{layer}" for layer in range(config.num_hidden_layers)]
    needed = tally.all[next(iter(CHOICES)), "all"]
    needed /= len(problems) * config.num_hidden_layers * config.num_key_value_heads
    print(
        f"{arguments.family}, {arguments.task}, {len(problems)} problems (seed {arguments.seed}), "
        f"windows of {WINDOW}, ratio {arguments.ratio:g}.\n"
        f"A head needs {needed:.1f} tokens of a text's windows. Kept by that head, in each layer\n"
        "and in all; by any head of the layer; and by how much later they are needed:"
    )
    print(table(list(CHOICES), [*layers, "all", "any", *AGES], tally.percent))
    print("\nTexts of which every needed token is kept by at least one head, in each layer:")
    print(table(list(CHOICES), layers, tally.whole_percent))
    for name, outcomes in correct.items():
        print(f"{name:22} {Share.of(outcomes).percent}% of the answers right")


if __name__ == "__main__":
    main()
