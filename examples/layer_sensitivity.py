"""How many tokens each layer of a tiny reasoner needs: squeeze one layer at a time, count answers.

A layer's demand is the smallest budget at which, with all other layers whole, the model still
answers like the full cache on every task (not more than `--tolerance` below). The demands are what
`ReasonAllocCache(profile=...)` takes. Measured on development problems, never on the test problems.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig

from examples.harness import FULL, Arm, load, run_arm
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, TASKS, make_problems
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.layers.budgeted import BudgetedLayer
from hf_reasoncache.layers.policy import EvictionPolicy
from hf_reasoncache.layers.pooled import PooledLayer
from hf_reasoncache.scorers import H2O

BUFFER = WINDOW = 16


def squeezed(config: PreTrainedConfig, layer: int, budget: int) -> ReasonCache:
    """A cache in which only one layer has a budget."""
    policy = EvictionPolicy(
        budget=budget,
        buffer=BUFFER,
        window=min(WINDOW, budget - 1),
        scorer=H2O(recent_ratio=0.0),
        head_budgets=False,
        protect_prompt=False,
    )

    def make_layer(index: int, rank: int, layers: int) -> PooledLayer:
        return BudgetedLayer(index, 0, policy) if rank == layer else PooledLayer(index)

    return ReasonCache(config, make_layer)


def demands(accuracy: dict[int, list[list[float]]], tolerance: float) -> list[float]:
    """Smallest sufficient budget of each layer.

    Parameters
    ----------
    accuracy : dict
        For each budget, `[layers][tasks]`; the largest budget is the full cache.
    tolerance : float
        Loss of accuracy that counts as none.
    """
    full = max(accuracy)
    layers = range(len(accuracy[full]))

    def enough(budget: int, layer: int) -> bool:
        pairs = zip(accuracy[budget][layer], accuracy[full][layer], strict=True)
        return all(got >= wanted - tolerance for got, wanted in pairs)

    return [float(min(b for b in accuracy if enough(b, layer))) for layer in layers]


def measure(family: str, count: int, budgets: Sequence[int]) -> dict[int, list[list[float]]]:
    """Accuracy by budget, layer and task; the entry of the longest chain is the full cache."""
    model, tokenizer = load(MODELS[family])
    problems = [make_problems(task, count, DEVELOPMENT_SEEDS[0], family) for task in TASKS]
    layers = model.config.num_hidden_layers
    total = len(TASKS) * count * (1 + layers * len(budgets))
    with tqdm(total=total, unit="problem") as progress:

        def accuracies(arm: Arm) -> tuple[list[float], int]:
            runs = [
                run_arm(model, tokenizer, some, arm, batch_size=count, progress=progress)
                for some in problems
            ]
            longest = max(outcome.length for run in runs for outcome in run.outcomes)
            return [sum(o.correct for o in run.outcomes) / count for run in runs], longest

        full, longest = accuracies(FULL)
        longest += max(len(problem.prompt.split()) for some in problems for problem in some)
        result = {longest: [full] * layers}
        for budget in budgets:
            result[budget] = [
                accuracies(Arm("", lambda c, i=layer, b=budget: squeezed(c, i, b)))[0]
                for layer in range(layers)
            ]
    return result


def main() -> None:
    """Measure, print, and write the profile beside the model's weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(MODELS), required=True)
    parser.add_argument("--problems", type=int, default=48)
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32, 64, 96, 128, 192])
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    accuracy = measure(arguments.family, arguments.problems, arguments.budgets)
    profile = {
        "demand": demands(accuracy, arguments.tolerance),
        "estimator": "smallest budget of one squeezed layer that keeps the accuracy",
        "tolerance": arguments.tolerance,
        "problems_per_task": arguments.problems,
        "seed": DEVELOPMENT_SEEDS[0],
        "tasks": list(TASKS),
        "accuracy": {str(budget): rows for budget, rows in sorted(accuracy.items())},
    }
    for budget, rows in sorted(accuracy.items()):
        print(f"budget {budget:4d}", [[round(value, 2) for value in row] for row in rows])
    print("demand", profile["demand"])
    path = MODELS[arguments.family] / "layer_demand.json"
    path.write_text(json.dumps(profile, indent=1) + "\n")
    print("written to", path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
