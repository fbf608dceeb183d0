"""What it costs to keep every token: how much a full pool grows, beside `DynamicCache`.

    python -m examples.benchmarks.growth --output docs/results
    python -m examples.benchmarks.growth --tokens 300 --every 100

One layer of Llama 8B (8 KV heads of size 128, 4 query heads each) in bfloat16, on one thread. All
moves of the pool and all times are real, attention and the concatenation of `DynamicCache` are
timed at every `--every`-th token. Peaks are those of 32 such layers, which move one after the
other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from examples.benchmarks.machine import Machine
from examples.benchmarks.results import write_csv
from hf_reasoncache.storage import pool_store
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.pool_store import PoolStore

HEADS, GROUP, SIZE, LAYERS = 8, 4, 128, 32
PARTS = (1, 2, 4, 16, 64)
"""A full pool grows by one part in so many."""


@dataclass(frozen=True)
class Row:
    """One way to grow; a line of the CSV.

    Attributes
    ----------
    grows : str
    moves : int
        How often tokens are copied to another storage.
    copies : float
        Times that a token is, on average.
    copying : float
        Time of that over the time of attention to what is held.
    slots : float
        Slots over tokens held, on average over the generation.
    peak : float
        Most bytes of 32 layers at once, over those of the tokens that they hold then.
    """

    grows: str
    moves: int
    copies: float
    copying: float
    slots: float
    peak: float

    def __str__(self) -> str:
        return (
            f"{self.grows:14}{self.moves:6}{self.copies:9.1f}{100 * self.copying:9.2f}%"
            f"{self.slots:7.2f}{self.peak:7.2f}"
        )


HEADER = f"{'grows':14}{'moves':>6}{'copies':>9}{'time':>10}{'slots':>7}{'peak':>7}"


def seconds(call: Callable[..., object], *arguments: object) -> float:
    """Processor time of a call."""
    begin = time.process_time()
    call(*arguments)
    return time.process_time() - begin


def new_tokens(count: int) -> NewTokens:
    """Random tokens of one row."""
    keys, values = (torch.randn(1, HEADS, count, SIZE).bfloat16() for _ in range(2))
    query = torch.randn(1, HEADS * GROUP, count, SIZE).bfloat16()
    settings = {"scaling": SIZE**-0.5, "softcap": None, "s_aux": None}
    return NewTokens(query, keys, values, None, settings)


def attention(prompt: int, tokens: int, every: int) -> float:
    """Seconds of attention in all steps, one of `every` timed."""
    store, token = filled(prompt + tokens), new_tokens(1)
    pool, found = store.tokens, 0.0
    for held in range(prompt, prompt + tokens, every):
        pool.note_length(torch.full_like(pool.length, held))
        found += every * seconds(store.attend, token, held)
    return found


def filled(count: int) -> PoolStore:
    """A store that holds so many tokens."""
    store = PoolStore()
    new = new_tokens(count)
    store.begin(new, count)
    fields = store.form.fields(new.keys, new.values)
    store.allocate(torch.full((1, HEADS), count), new).append(fields, torch.arange(count))
    return store


def pools(prompt: int, tokens: int, attending: float) -> Iterator[Row]:
    """Grow a pool by different parts."""
    for part in PARTS:
        with mock.patch.object(pool_store, "GROWTH", part):
            store, held, capacities, taken, copied, peak = filled(prompt), prompt, [], 0.0, 0, 1.0
            moves, last = 0, prompt
            while held < prompt + tokens:
                old = store.tokens.layout.slots // HEADS
                taken += seconds(store.make_room, 1)
                new = store.tokens.layout.slots // HEADS
                moves, copied = moves + 1, copied + held
                # The last of the layers moves.
                peak = max(peak, (LAYERS * new + old) / LAYERS / held)
                last = min(new, prompt + tokens)
                capacities += [new / each for each in range(held, last)]
                held = last
                store.tokens.note_length(torch.full_like(store.tokens.length, held))
            yield Row(
                grows=f"by 1/{part}" if part > 1 else "doubles",
                moves=moves,
                copies=copied / (prompt + tokens),
                copying=taken / attending,
                slots=sum(capacities) / len(capacities),
                peak=peak,
            )


def concatenation(prompt: int, tokens: int, every: int, attending: float) -> Row:
    """What `DynamicCache` does at every step."""
    taken, new = 0.0, new_tokens(1)
    keys = torch.randn(1, HEADS, prompt + tokens, SIZE).bfloat16()
    for held in range(prompt, prompt + tokens, every):
        before = keys[:, :, :held].contiguous()
        taken += every * 2 * seconds(torch.cat, [before, new.keys], -2)
    copied = sum(range(prompt, prompt + tokens))
    return Row(
        grows="DynamicCache",
        moves=tokens,
        copies=copied / (prompt + tokens),
        copying=taken / attending,
        slots=1.0,
        peak=(LAYERS + 1) / LAYERS,
    )


def run(prompt: int, tokens: int, every: int, output: Path | None) -> list[Row]:
    """Measure; print the rows, and write `growth.csv`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = Machine.here(seed=0)
    print(f"{machine}\n{prompt} + {tokens} tokens\n{HEADER}")
    attending = attention(prompt, tokens, every)
    rows = [*pools(prompt, tokens, attending), concatenation(prompt, tokens, every, attending)]
    for row in rows:
        print(row)
    if output is not None:
        write_csv(output / "growth.csv", rows, machine, prompt=prompt, tokens=tokens)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Measure how a pool without a budget grows.")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--every", type=int, default=512)
    parser.add_argument("--output", type=Path, help="folder for growth.csv")
    given = parser.parse_args(arguments)
    run(given.prompt, given.tokens, given.every, given.output)


if __name__ == "__main__":
    main()
