"""What a decode step asks of a GPU, counted on a device that is not there: see `fake_device`.

Prints the table of docs/kernels.md, puts it there, or shows which lines of code are behind a row,
all layers together:

    TRITON_INTERPRET=1 python -m tests.support.count_steps
    TRITON_INTERPRET=1 python -m tests.support.count_steps --write
    TRITON_INTERPRET=1 python -m tests.support.count_steps "budget, eviction"

A layer's part is that of the second and of the third layer, which must do the same. What the model
does besides, and what the first layer does for all of them, is the rest of the step.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_reasoncache import (
    ReasonAllocCache,
    SharedBranchCache,
    SlidingWindowCompressCache,
    decode_graphs,
)
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.risk import Probes, Risk
from hf_reasoncache.scorers import H2O
from tests.support.fake_device import DEVICE, Counts, Event, FakeDevice, fake_device
from tests.support.models import SHAPE, VOCABULARY
from triton_ops.backend import interpreting, use_backend

DOCS = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
HEADER = (
    "| step | operations | launches | waits | copies "
    "| + operations | + launches | + waits | + copies |"
)

TABLE = re.compile(rf"^(torch \S+, .*:\n\n{re.escape(HEADER)}\n(?:\|.*\n)*\|.*)$", re.MULTILINE)

LAYERS = 3
PROMPT = 9  # tokens
CALM: dict[str, Any] = dict(budget=24, buffer=8, window=2)
"""Settings with which no row is due in the first forwards."""
FULL: dict[str, Any] = dict(budget=16, buffer=2, window=2)
"""Settings with which a row without padding evicts before tokens 10, 12, ... after the prompt."""
HEADS: dict[str, Any] = FULL | dict(head_budgets=True)

PADDED: dict[str, Any] = dict(before=11, rows=2, padding=3, evicts=1)
"""The row without padding evicts."""
PROBES = Risk(probes=Probes(heads=1.0))

MakeCache = Callable[[LlamaConfig], Cache]


def dynamic(config: LlamaConfig) -> Cache:
    return DynamicCache(config=config)


def reason(**settings: Any) -> MakeCache:
    return lambda config: ReasonAllocCache(config, **settings)


def branches(**settings: Any) -> MakeCache:
    suffix = ReasonAllocCache.policy(**settings) if settings else None
    return lambda config: SharedBranchCache(config, suffix=suffix)


def windows(config: LlamaConfig) -> Cache:
    cache = SlidingWindowCompressCache(config, window=4, ratio=0.5, recent=2)
    for layer in cache.layers:
        # Layers take turns. Here all compress in the same step, so that one step shows it.
        layer.policy = replace(layer.policy, phase=0)
    return cache


@dataclass(frozen=True)
class Case:
    """A forward to count.

    Attributes
    ----------
    name : str
    make : Callable
        Makes the cache.
    before : int
        Forwards of one token between the prompt and the one that is counted. Some things are made
        in the first and the second one, for all that follow.
    rows : int
        All with the same prompt.
    padding : int
        Columns of padding in the last row.
    tokens : int
        Of the forward that is counted.
    evicts : int
        Rows that evict in it, in every layer.
    moves : bool
        Whether every pool moves into another storage in it.
    captured : bool
        Count what a CUDA graph of the forward would hold.
    """

    name: str
    make: MakeCache
    before: int = 2
    rows: int = 1
    padding: int = 0
    tokens: int = 1
    evicts: int = 0
    moves: bool = False
    captured: bool = False


CASES = (
    Case("DynamicCache", dynamic),
    Case("DynamicCache, padded rows", dynamic, rows=2, padding=3),
    Case("DynamicCache, 3 tokens", dynamic, tokens=3),
    Case("no budget", reason(budget=None)),
    Case("no budget, padded rows", reason(budget=None), rows=2, padding=3),
    Case("no budget, 3 tokens", reason(budget=None), tokens=3),
    Case("no budget, first token", reason(budget=None), before=0),
    Case("no budget, captured", reason(budget=None), captured=True),
    Case("budget", reason(**CALM)),
    Case("budget, padded rows", reason(**CALM), rows=2, padding=3),
    Case("budget, 3 tokens", reason(**CALM), tokens=3),
    Case("budget, first token", reason(**CALM), before=0),
    Case("budget, captured", reason(**CALM), captured=True),
    Case("budget, risk limit", reason(**CALM, risk=0.1)),
    Case("budget, risk limit, padded rows", reason(**CALM, risk=0.1), rows=2, padding=3),
    Case("budget, probes", reason(**CALM, risk=PROBES)),
    Case("budget, probes, padded rows", reason(**CALM, risk=PROBES), rows=2, padding=3),
    Case("budget, attention mass", reason(**CALM, scorer=H2O())),
    Case("branches", branches(), rows=3),
    Case("branches, pool grows", branches(), before=17, rows=3, moves=True),
    Case("branches, budget", branches(**CALM), rows=3),
    Case("branches, budget, padded rows", branches(**CALM), rows=3, padding=3),
    Case("windows", windows),
    Case("budget, head budgets, first eviction", reason(**HEADS), before=9, evicts=1),
    Case("budget, eviction", reason(**FULL), before=11, evicts=1),
    Case("budget, one of two rows evicts", reason(**FULL), before=11, rows=2, padding=3, evicts=1),
    Case("budget, head budgets, eviction", reason(**HEADS), before=11, evicts=1),
    Case("budget, eviction, risk", reason(**FULL, risk=True), before=11, evicts=1),
    Case("budget, eviction, risk limit kept", reason(**FULL, risk=9.0), before=11, evicts=1),
    Case("budget, eviction, risk limit missed", reason(**FULL, risk=1e-6), before=11, evicts=1),
    Case("risk limit kept, padded rows", reason(**FULL, risk=9.0), **PADDED),
    Case("risk limit missed, padded rows", reason(**FULL, risk=1e-6), **PADDED),
    Case("budget, eviction, probes", reason(**FULL, risk=PROBES), before=11, evicts=1),
    Case("eviction, probes, padded rows", reason(**FULL, risk=PROBES), **PADDED),
    Case("branches, budget, eviction", branches(**FULL), before=11, rows=3, evicts=3),
    Case(
        "branches, budget, padded, two evict",
        branches(**FULL),
        before=11,
        rows=3,
        padding=3,
        evicts=2,
    ),
    Case("windows, eviction", windows, before=9, evicts=1),
)


@dataclass(frozen=True)
class Cost:
    """What a forward asks of the device: in each layer, and in the rest of the model."""

    layer: Counts
    rest: Counts

    @property
    def numbers(self) -> tuple[int, ...]:
        """The columns of the table."""
        return astuple(self.layer) + astuple(self.rest)

    def row(self, name: str) -> str:
        """Return the row of the table."""
        return f"| {name} | {' | '.join(map(str, self.numbers))} |"


class _Recorder:
    """Counts a forward that is captured; see `hf_reasoncache.graphs.Recorder`."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.events: list[Event] = []

    def record(self, step: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        with self.device.counting() as self.events:
            return step(), step


def events_of(case: Case) -> list[Event]:
    """Run a case; return what its last forward asks of the device, and marks between layers."""
    with fake_device() as device, torch.no_grad():
        model = _model().to(DEVICE)
        model.set_attn_implementation("sdpa" if case.make is dynamic else "reasoncache")
        for module in (*model.model.layers, model.model.norm):
            module.register_forward_pre_hook(lambda *_: device.note("mark", "layer"))
        cache = case.make(model.config)
        # The kernels are slow here: they run in the last forward, and in the one before, which
        # makes what is made once.
        *early, warming, counted = _inputs(case)
        with use_backend("torch"):
            for inputs in early:
                model(**inputs, **cache_kwarg(cache), use_cache=True)
        with use_backend("triton"):
            if case.captured:
                recorder = _Recorder(device)
                with decode_graphs(model, cache, recorder=recorder):
                    for inputs in (warming, counted):
                        model(**inputs, **cache_kwarg(cache), use_cache=True)
                return recorder.events
            model(**warming, **cache_kwarg(cache), use_cache=True)
            before = _states(cache)
            with device.counting() as events:
                model(**counted, **cache_kwarg(cache), use_cache=True)
    found = [
        (now - then, keys is not old)
        for (now, keys), (then, old) in zip(_states(cache), before, strict=True)
    ]
    if found != [(case.evicts, case.moves)] * LAYERS:
        raise RuntimeError(
            f"{case.name}: expected {case.evicts} rows to evict in each layer, and pools that "
            f"{'move' if case.moves else 'stay'}, got {found}."
        )
    return events


def cost_of(case: Case) -> Cost:
    """Count a case for one layer, and for the rest of the model."""
    events = events_of(case)
    marks = [index for index, event in enumerate(events) if event.kind == "mark"]
    _, *layers = (Counts.of(events[begin:end]) for begin, end in pairwise(marks))
    if len(set(layers)) != 1:
        raise RuntimeError(f"{case.name}: expected layers that do the same, got {layers}.")
    return Cost(layers[0], Counts.of(events) - layers[0] * LAYERS)


def documented() -> dict[str, Cost]:
    """Return the table of the documentation, by case."""
    _, found, _ = TABLE.split(DOCS.read_text("utf-8"))
    cells = [row.strip("| ").split(" | ") for row in found.splitlines()[4:]]
    numbers = {name: [int(each) for each in counted] for name, *counted in cells}
    return {name: Cost(Counts(*each[:4]), Counts(*each[4:])) for name, each in numbers.items()}


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = dict(num_hidden_layers=LAYERS, hidden_size=32, num_attention_heads=4, head_dim=16)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | size)).eval()


def _inputs(case: Case) -> list[dict[str, torch.Tensor]]:
    """Return the inputs of all forwards, on the device: the prompt, tokens, the one to count."""
    ends = [*range(PROMPT, PROMPT + case.before + 1), PROMPT + case.before + case.tokens]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (1, ends[-1]), generator=generator).repeat(case.rows, 1)
    mask = torch.ones_like(ids)
    mask[-1, : case.padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return [
        {
            "input_ids": ids[:, begin:end].to(DEVICE),
            "attention_mask": mask[:, :end].to(DEVICE),
            "position_ids": positions[:, begin:end].to(DEVICE),
        }
        for begin, end in pairwise([0, *ends])
    ]


def _states(cache: Cache) -> list[tuple[int, object]]:
    """Return how often the rows of each layer have evicted, and the keys of its pool."""
    stores = [getattr(layer, "store", None) for layer in cache.layers]
    evictions = [getattr(layer, "evictions", 0) for layer in cache.layers]
    keys = [store and store.tokens.fields["keys"] for store in stores]
    return list(zip(evictions, keys, strict=True))


def table() -> str:
    """Count all cases; return the part of the documentation that `TABLE` finds."""
    versions = {"torch": torch, "transformers": transformers, "triton": triton}
    said = ", ".join(f"{name} {library.__version__}" for name, library in versions.items())
    rows = [cost_of(case).row(case.name) for case in CASES]
    return "\n".join([f"{said}:", "", HEADER, f"|{'---|' * 9}", *rows])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", nargs="?", help="name of a row, to see where each count comes from")
    parser.add_argument("--write", action="store_true", help=f"put the table into docs/{DOCS.name}")
    chosen = parser.parse_args(arguments)
    cases = {case.name: case for case in CASES}
    if not interpreting():
        parser.error("expected TRITON_INTERPRET=1 in the environment, got a process without it")
    if chosen.case is not None and chosen.case not in cases:
        parser.error(f"case: expected one of {'; '.join(cases)}, got {chosen.case}")
    if chosen.case is not None:
        events = (event for event in events_of(cases[chosen.case]) if event.kind != "mark")
        for event, times in Counter(events).most_common():
            print(f"{times:4} {event.kind:15} {event.name:40} {event.place}")
    elif chosen.write:
        before, _, after = TABLE.split(DOCS.read_text("utf-8"))
        DOCS.write_text(before + table() + after, "utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
