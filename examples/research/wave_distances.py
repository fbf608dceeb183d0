"""How far waves are apart: within a task, across tasks, across models.

    python -m examples.research.wave_distances

ReasonAlloc (arXiv 2606.11164) takes its wave for a property of the architecture: waves of one
model on different tasks are nearer to each other (0.0132) than those of different models (0.0503).
Here every task of both tiny reasoners is calibrated twice, on different problems.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from tqdm import tqdm

from examples.research.policies import BUFFER, WINDOW
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, TASKS, make_problems
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache.calibration.coverage import Coverage
from hf_reasoncache.calibration.estimate import Estimator
from hf_reasoncache.calibration.prompts import Prompt, PromptSet
from hf_reasoncache.calibration.run import calibrate
from hf_reasoncache.calibration.sensitivity import Eviction, Sensitivity
from hf_reasoncache.calibration.settings import CalibrationSettings
from hf_reasoncache.calibration.traces import TraceSettings
from hf_reasoncache.profiles.distance import wave_distance
from hf_reasoncache.scorers import RKV

SEEDS = (DEVELOPMENT_SEEDS[210], DEVELOPMENT_SEEDS[211])
TIGHT = {"llama": 96, "qwen3": 192}
"""The mean budgets of the published tables."""


@dataclass(frozen=True)
class Wave:
    """One calibration."""

    family: str
    task: str
    seed: int
    demand: tuple[float, ...]


def estimator(name: str, family: str) -> Estimator:
    """The estimator with the settings that made the shipped profiles."""
    if name == "coverage":
        return Coverage(interval=32)
    budget = TIGHT[family]
    return Sensitivity(
        budgets=tuple(budget * part // 12 for part in (2, 4, 6, 8, 12, 16, 24)),
        budget=budget,
        eviction=Eviction(RKV(queries=WINDOW), BUFFER, WINDOW),
        every=1,
    )


def measure(family: str, name: str, count: int, progress: tqdm) -> list[Wave]:
    """Calibrate every task of a family on each of the seeds."""
    model, tokenizer = load(MODELS[family])
    model.set_attn_implementation("reasoncache")
    settings = CalibrationSettings(
        estimator(name, family), TraceSettings(512, batch_size=count, temperature=0.0)
    )
    waves = []
    for task in TASKS:
        for seed in SEEDS:
            problems = make_problems(task, count, seed, family)
            prompts = tuple(Prompt(p.prompt, f"{task} {i}") for i, p in enumerate(problems))
            with tempfile.TemporaryDirectory() as folder:
                profile = calibrate(
                    model,
                    tokenizer,
                    PromptSet(task, None, prompts),
                    Path(folder) / "wave",
                    settings,
                    progress=False,
                )
            waves.append(Wave(family, task, seed, profile.demand))
            progress.update()
    return waves


def kind(a: Wave, b: Wave) -> str:
    """What two waves do not share."""
    if a.family != b.family:
        return "across models, same task" if a.task == b.task else "across models and tasks"
    return "across tasks, same model" if a.task != b.task else "within a task, other problems"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--estimator", choices=("coverage", "sensitivity"), default="coverage")
    parser.add_argument("--problems", type=int, default=16, help="of each task and seed")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    waves: list[Wave] = []
    with tqdm(total=len(MODELS) * len(TASKS) * len(SEEDS), unit="profile") as progress:
        for family in MODELS:
            waves += measure(family, arguments.estimator, arguments.problems, progress)
    found: dict[str, list[float]] = {}
    for a, b in combinations(waves, 2):
        name = kind(a, b) + ("" if a.family != b.family else f" ({a.family})")
        found.setdefault(name, []).append(wave_distance(a.demand, b.demand))
    print("| waves | pairs | mean distance | least | most |\n|---|---|---|---|---|")
    for name, each in sorted(found.items()):
        mean = sum(each) / len(each)
        print(f"| {name} | {len(each)} | {mean:.4f} | {min(each):.4f} | {max(each):.4f} |")


if __name__ == "__main__":
    main()
