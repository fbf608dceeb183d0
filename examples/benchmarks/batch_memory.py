"""What a batch generator gets done at one bound on the cache's memory, with each cache.

    python -m examples.benchmarks.batch_memory

Answers the same prompts of the tiny Llama reasoner with `hf-reasoncache generate`, one cache after
another in turns, and counts right answers. Writes a CSV, and the table of docs/many_prompts.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.benchmarks.machine import Machine
from examples.benchmarks.turns import rotated
from examples.research.tables import insert, markdown, write_csv
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, TASKS, read_answer
from examples.tiny_reasoner.prompts import in_turn
from hf_reasoncache.cli.generate import generate_command
from hf_reasoncache.cli.options import Dtype
from hf_reasoncache.evaluation import Share

ROOT = Path(__file__).resolve().parents[2]
FAMILY = "llama"
SEED = DEVELOPMENT_SEEDS[870]
SMALL = {"window": 16, "buffer": 16}
"""As in the other examples: texts here have some 300 tokens."""

WAVE = MODELS[FAMILY] / "tuned"
EVICT = f"reason-alloc:prompt=evict,profile={WAVE}"
KEEP = f"reason-alloc:profile={WAVE}"


@dataclass(frozen=True)
class Trial:
    """One row of the table: a cache, and how often each prompt is answered."""

    name: str
    cache: str
    budget: str | None
    samples: int

    def options(self) -> dict[str, Any]:
        """What the generator is told."""
        sampled = {"samples": self.samples, "temperature": 1.0} if self.samples > 1 else {}
        return {"cache": self.cache, "budget": self.budget, **SMALL, **sampled}


def trials(samples: int) -> list[Trial]:
    """One answer with each cache, then several that share their prompt."""
    return [
        Trial("full", "full", None, 1),
        Trial("R-KV, tuned wave, 112", EVICT, "112", 1),
        Trial("R-KV, tuned wave, 96", EVICT, "96", 1),
        Trial("R-KV, 96", "rkv:prompt=evict", "96", 1),
        Trial("random, 96", "random:prompt=evict", "96", 1),
        Trial("full, prompt shared", "full", None, samples),
        Trial("R-KV, tuned wave, 176, prompt shared", KEEP, "176", samples),
    ]


def write_prompts(path: Path, count: int) -> None:
    """Write prompts with their answers."""
    with path.open("w") as file:
        for problem in in_turn(TASKS, count, SEED, FAMILY):
            new = problem.max_new_tokens
            row = {"prompt": problem.prompt, "answer": problem.answer, "max_new_tokens": new}
            file.write(json.dumps(row) + "\n")


def run(trial: Trial, prompts: Path, memory: str, folder: Path) -> dict[str, Any]:
    """Answer all prompts once with one cache: what its meta file says, and its right answers."""
    out = folder / "answers.jsonl"
    settings = {"dtype": Dtype.float32, "device": "cpu", "threads": 1, "memory": memory}
    with contextlib.redirect_stdout(io.StringIO()):
        generate_command(
            model=str(MODELS[FAMILY]), prompts=prompts, out=out, **settings, **trial.options()
        )
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    found: dict[str, Any] = json.loads(out.with_name(f"{out.name}.meta.json").read_text("utf-8"))
    found["right"] = Share.of([read_answer(row["text"]) == row["answer"] for row in rows])
    for path in folder.iterdir():
        path.unlink()
    return found


def summarize(trial: Trial, runs: list[dict[str, Any]]) -> dict[str, str]:
    """Make a row of the table of the rounds of one cache."""
    works = [each["last_run"] for each in runs]
    wall = sorted(work["tokens"] / work["seconds"] for work in works)
    cpu = sorted(work["tokens"] / work["cpu_seconds"] for work in works)
    first = works[0]
    return {
        "cache": trial.name,
        "samples": str(trial.samples),
        "rows in a step": f"{first['rows'] / first['steps']:.1f}",
        "peak, MB": f"{first['peak_bytes'] / 1e6:.2f}",
        "tokens": f"{first['tokens']}",
        "tokens/s": f"{statistics.median(wall):.0f} ({wall[0]:.0f}-{wall[-1]:.0f})",
        "tokens per CPU s": f"{statistics.median(cpu):.0f} ({cpu[0]:.0f}-{cpu[-1]:.0f})",
        "right": runs[0]["right"].percent,
    }


def main() -> None:
    """Run all caches in turns, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=24, help="problems of each task")
    parser.add_argument("--samples", type=int, default=4, help="of a prompt that is shared")
    parser.add_argument("--memory", default="16MB", help="the bound")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=ROOT / "docs/results/batch_memory.csv")
    parser.add_argument("--document", type=Path, help="whose table is replaced")
    arguments = parser.parse_args()
    chosen = trials(arguments.samples)
    runs: dict[str, list[dict[str, Any]]] = {trial.name: [] for trial in chosen}
    machine = Machine.here(SEED).row()
    with tempfile.TemporaryDirectory() as name, tqdm(total=len(chosen) * arguments.rounds) as bar:
        prompts, folder = Path(name) / "prompts.jsonl", Path(name) / "out"
        folder.mkdir()
        write_prompts(prompts, arguments.count)
        for turn in range(arguments.rounds):
            for trial in rotated(chosen, turn):
                bar.set_description(trial.name)
                runs[trial.name].append(run(trial, prompts, arguments.memory, folder))
                bar.update()
    rows = [summarize(trial, runs[trial.name]) for trial in chosen]
    write_csv(arguments.csv, [row | {k: str(x) for k, x in machine.items()} for row in rows])
    note = (
        f"{3 * arguments.count} problems (seed {SEED}), at most {arguments.memory} for the cache, "
        f"compaction every 16 tokens, median of {arguments.rounds} rounds in turns (lowest-highest)"
        f"; float32, one thread, {machine['cpu']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, commit {machine['commit']}."
    )
    table = markdown(rows, note)
    print(table)
    if arguments.document is not None:
        insert(arguments.document, "batch-memory", table)


if __name__ == "__main__":
    main()
