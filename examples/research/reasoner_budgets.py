"""Right chains of the reasoner under budgets: scorers, layer profiles, windows, random eviction.

    python -m examples.real_model.reasoner.adapter --out build/reasoner-merged
    python -m examples.research.reasoner_budgets
    python -m examples.research.reasoner_budgets --tasks routes
    python -m examples.research.reasoner_budgets --table sweep

The first table is on fresh problems, and so is that of `routes`, of which fewer are read; the third
compares settings on development problems. Every chain is kept in a journal at once; a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.real_model.model import SENSITIVITY, load
from examples.real_model.reasoner.problems import DEVELOPMENT_SEEDS, TASKS, TEST_SEEDS
from examples.research.arguments import parse, real_parser
from examples.research.chains import MERGED, ONE_BUDGET, OWN, Arm
from examples.research.reading import Reading, read_arms
from examples.research.tables import interval_of_mean, publish, versions
from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache
from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.evaluation import CacheSpec, Paired, Share
from hf_reasoncache.evaluation.fidelity import CHUNK
from hf_reasoncache.evaluation.plot import Line, Panel, panels_png
from hf_reasoncache.evaluation.specs import FULL
from hf_reasoncache.profiles import BudgetProfile
from hf_reasoncache.scorers import H2O, RKV, Random, SnapKV
from hf_reasoncache.scorers.base import Scorer

SOLVED = ("trades", "ledger")
"""Tasks of which some chains are right with the profile of the package."""

WINDOW, BUFFER = 8, 32
MAIN = "R-KV, profile"
"""What all others are compared with; the profile is that of SmolLM2, which is in the package."""

MORE_WINDOWS = "windows of ratio 0.7, profile"
FROM_ONE_BUDGET = "R-KV, own profile of one budget"
OWN_CHANCE = "random, own profile"
NOT_DRAWN = (MORE_WINDOWS, FROM_ONE_BUDGET, OWN_CHANCE)
"""The picture has seven colours."""

COMMON: dict[str, Any] = {"window": WINDOW, "buffer": BUFFER, "protect": False}


def shipped() -> BudgetProfile:
    """The profile of SmolLM2 that is in the package."""
    return BudgetProfile.from_pretrained(SENSITIVITY, with_statistics=False)


def threshold(name: str, scorer: Scorer, profile: BudgetProfile | None, **more: Any) -> CacheSpec:
    """A `ReasonAllocCache` with the settings of all these tables, but for `more`."""
    return CacheSpec(
        name, ReasonAllocCache, {**COMMON, "scorer": scorer, "profile": profile, **more}
    )


def windows(name: str, profile: BudgetProfile, window: int, recent: int, ratio: float) -> CacheSpec:
    """A `SlidingWindowCompressCache` that holds as much between two compactions."""
    settings = {"window": window, "recent": recent, "ratio": ratio, "protect": False}
    return CacheSpec(name, SlidingWindowCompressCache, settings | {"profile": profile})


def specs(own: Path = OWN) -> dict[str, CacheSpec]:
    """Return the caches of the first table; `own` has the reasoner's own profile."""
    profile = shipped()
    calibrated, one_budget = (
        BudgetProfile.from_pretrained(each, with_statistics=False) for each in (own, ONE_BUDGET)
    )
    made = [
        FULL,
        threshold(MAIN, RKV(), profile),
        threshold("R-KV, own profile", RKV(), calibrated),
        threshold(FROM_ONE_BUDGET, RKV(), one_budget),
        threshold("R-KV", RKV(), None),
        threshold("SnapKV, profile", SnapKV(), profile),
        threshold("H2O, profile", H2O(), profile),
        windows("windows, profile", profile, BUFFER, WINDOW, 0.5),
        windows(MORE_WINDOWS, profile, BUFFER, WINDOW, 0.7),
        threshold("random, profile", Random(), profile),
        threshold(OWN_CHANCE, Random(), calibrated),
    ]
    return {spec.name: spec for spec in made}


def sweep(budget: int, problems: int, own: Path = OWN) -> list[Arm]:
    """Return the arms of the second table, the base first; each differs in what its name says."""
    profile = shipped()
    calibrated = BudgetProfile.from_pretrained(own, with_statistics=False)
    arms: list[Arm] = []

    def add(name: str, scorer: Scorer | None = None, spent: int = budget, **changes: Any) -> None:
        settings = {"profile": profile} | changes
        arms.append(Arm(threshold(name, scorer or RKV(), **settings), spent, problems))

    add(MAIN)
    add("equal layers", profile=None)
    add("own profile", profile=calibrated)
    for exponent, low, high in ((1.0, 0.25, 4.0), (0.5, 0.25, 4.0)):
        name = f"own profile, exponent {exponent:g}, bounds {low:g} to {high:g}"
        add(name, profile=replace(calibrated, rule=BudgetRule(exponent, low, high)))
    rules = ((0.5, 0.25, 2.0), (1.5, 0.25, 4.0), (1.0, 0.5, 2.0), (1.0, 0.25, 4.0))
    for exponent, low, high in rules:
        name = f"exponent {exponent:g}, bounds {low:g} to {high:g}"
        add(name, profile=replace(profile, rule=BudgetRule(exponent, low, high)))
    for scorer in (SnapKV(), H2O(), Random()):
        add(type(scorer).__name__, scorer)
    for window in (16, 32):
        add(f"window {window}", RKV(queries=window), window=window)
        add(f"SnapKV, window {window}", SnapKV(queries=window), window=window)
    for lam in (0.0, 0.3, 0.5, 1.0):
        add(f"lambda {lam:g}", RKV(lam=lam))
    for kernel in (1, 3):
        add(f"pool {kernel}", RKV(kernel=kernel))
    # As many tokens on average between two compactions as with the buffer of the base.
    for buffer in (8, 16, 64, 128):
        add(f"buffer {buffer}", spent=budget + (BUFFER - buffer) // 2, buffer=buffer)
    add("head budgets", head_budgets=True)
    for window, recent, ratio in ((32, 8, 0.5), (64, 16, 0.5), (128, 32, 0.3)):
        spec = windows(f"windows of {window}, ratio {ratio:g}", profile, window, recent, ratio)
        arms.append(Arm(spec, budget + (BUFFER - window) // 2, problems))
    return arms


def parse_arm(text: str, own: Path = OWN) -> Arm:
    """Turn "NAME:BUDGET:PROBLEMS" (no budget for the full cache) into an arm of the first table.

    Raises
    ------
    ValueError
        If the name is not known, or there are not three parts.
    """
    made, parts = specs(own), text.split(":")
    if len(parts) != 3 or parts[0] not in made:
        raise ValueError(f"--arms: expected NAME:BUDGET:PROBLEMS of {list(made)}, got {text!r}.")
    name, budget, problems = parts
    return Arm(made[name], int(budget) if budget else None, int(problems))


def line(found: Sequence[Reading], main: Sequence[Reading] | None) -> dict[str, str]:
    """Row of a table: an arm, compared with another on the problems that both have read."""
    tasks = dict.fromkeys(each.task for each in found)
    row = {
        "budget": "full" if found[0].budget is None else str(found[0].budget),
        "cache": found[0].cache,
        "of each": str(len(found) // len(tasks)),
    }
    for task in tasks:
        row[task] = Share.of([each.correct for each in found if each.task == task]).percent
    row |= {
        "all": Share.of([each.correct for each in found]).percent,
        "held": f"{statistics.mean(each.held for each in found):.0f}",
        "right until": f"{100 * statistics.mean(each.right / each.length for each in found):.0f}",
        f"against {MAIN}": "",
        "p": "",
        "right until, against it": "",
    }
    if main is not None and main[0].cache != found[0].cache:
        pairs = both(found, main)
        paired = Paired.of([a.correct for a, _ in pairs], [b.correct for _, b in pairs])
        row[f"against {MAIN}"] = f"{100 * paired.difference:+.1f} of {paired.total}"
        row["p"] = f"{paired.p_value:.2g}"
        apart = np.array([b.right / b.length - a.right / a.length for a, b in pairs])
        row["right until, against it"] = interval_of_mean(100 * apart)
    return row


def both(found: Sequence[Reading], main: Sequence[Reading]) -> list[tuple[Reading, Reading]]:
    """Pairs of the other arm's and this arm's chains of the same problems."""
    others = {(each.task, each.number): each for each in main}
    return [
        (others[each.task, each.number], each)
        for each in found
        if (each.task, each.number) in others
    ]


def picture(arms: Sequence[Sequence[Reading]]) -> bytes:
    """Draw the share of right chains over the tokens held, a panel for each task."""
    full = next((found for found in arms if found[0].budget is None), None)

    def share(found: Sequence[Reading], task: str) -> Share:
        return Share.of([each.correct for each in found if task in (each.task, "all")])

    panels = []
    for task in (*dict.fromkeys(each.task for each in arms[0]), "all"):
        lines = []
        names = dict.fromkeys(found[0].cache for found in arms if found[0].cache not in NOT_DRAWN)
        for name in names:
            points = sorted(
                (statistics.mean(each.held for each in found), share(found, task))
                for found in arms
                if found[0].cache == name and found[0].budget is not None
            )
            if points:
                places, shares = zip(*points, strict=True)
                reference = None if full is None else share(full, task).value
                lines.append(Line(name, places, shares, reference))
        panels.append(Panel(task, lines))
    return panels_png(panels, "tokens held", "right chains")


def main(given: Sequence[str] | None = None) -> None:
    """Read what is missing, print the table, write it and the picture."""
    made = real_parser(__doc__, "results.md", threads=1, model=MERGED)
    made.add_argument("--table", choices=("budgets", "sweep"), default="budgets")
    made.add_argument("--profile", type=Path, default=OWN, help="the reasoner's own")
    made.add_argument("--arms", nargs="+", metavar="NAME:BUDGET:PROBLEMS")
    made.add_argument("--budget", type=int, default=224, help="of the sweep")
    made.add_argument("--problems", type=int, default=50, help="of each task, of the sweep")
    made.add_argument("--only", nargs="+", metavar="NAME", help="settings of the sweep")
    made.add_argument("--tasks", nargs="+", choices=TASKS, default=list(SOLVED))
    made.add_argument("--batch-size", type=int, default=50)
    made.add_argument("--journal", type=Path, default=Path("build/reasoner_readings.jsonl"))
    arguments = parse(made, given)
    is_sweep, of_all = arguments.table == "sweep", tuple(arguments.tasks) == SOLVED
    command = "python -m examples.research.reasoner_budgets"
    name = f"reasoner-{arguments.table}"
    if not of_all:
        command += f" --tasks {' '.join(arguments.tasks)}"
        name += f"-{'-'.join(arguments.tasks)}"
    if is_sweep:
        arms = sweep(arguments.budget, arguments.problems, arguments.profile)
        wanted = {MAIN, *(arguments.only or [arm.spec.name for arm in arms])}
        arms = [arm for arm in arms if arm.spec.name in wanted]
    else:
        texts = arguments.arms or (ARMS if set(arguments.tasks) <= set(SOLVED) else FEWER)
        arms = [parse_arm(text, arguments.profile) for text in texts]
    seed = (DEVELOPMENT_SEEDS if is_sweep else TEST_SEEDS)[0]
    model, tokenizer = load(torch.bfloat16, arguments.model)
    given_arms = (model, tokenizer, arms, arguments.tasks, seed, arguments.journal)
    found = read_arms(*given_arms, arguments.batch_size)
    mains = {each[0].budget: each for each in found if each[0].cache == MAIN}
    least = mains[min(budget for budget in mains if budget is not None)]
    rows = [line(each, least if is_sweep else mains.get(each[0].budget)) for each in found]
    kind = "development" if is_sweep else "fresh"
    note = (
        f"The reasoner in bfloat16, the first {kind} problems of each task (seed {seed}), window "
        f"{WINDOW}, buffer {BUFFER}, prompt evictable. Chains that greedy decoding would write to "
        f"the letter, in percent with Wilson's 95% interval, found by reading the script's chain "
        f"{CHUNK} tokens at a time, which makes the buffer act as {BUFFER + CHUNK}; `held`: tokens "
        "per KV head until the first wrong token; `right until`: share of the chain before it, in "
        f"percent; against {MAIN} on the same problems: points and p of McNemar's exact test, and "
        "the mean difference of `right until` with its bootstrapped "
        f"95% interval. `{command}{' --table sweep' if is_sweep else ''}`, {versions()}."
    )
    publish(rows, note, name, arguments.output, arguments.document)
    if not is_sweep and of_all:
        (arguments.output / f"{name}.png").write_bytes(picture(found))


ARMS = [
    "full::200",
    "R-KV, profile:192:200",
    "R-KV, own profile:192:200",
    "R-KV, profile:224:200",
    "R-KV, own profile:224:200",
    f"{FROM_ONE_BUDGET}:224:50",
    "R-KV:224:200",
    "SnapKV, profile:224:50",
    "H2O, profile:224:50",
    "windows, profile:224:50",
    f"{MORE_WINDOWS}:224:50",
    "random, profile:224:200",
    f"{OWN_CHANCE}:224:50",
    "R-KV, profile:256:200",
    "R-KV, own profile:256:200",
]
"""Those of the published table."""

FEWER = [
    "full::200",
    *(f"R-KV, profile:{budget}:50" for budget in (192, 224, 256)),
    *(f"R-KV, own profile:{budget}:50" for budget in (192, 224, 256)),
    "R-KV:224:50",
    "random, profile:224:50",
]
"""Those of the table of `routes`."""

if __name__ == "__main__":
    main()
