"""The phenomena of "The Pitfalls of KV Cache Compression", and its remedies, on an audit suite.

    python -m examples.research.pitfalls --family smollm2
    python -m examples.research.pitfalls --family llama

Eight methods and the random control, each as it is, with the instructions protected, and with fair
eviction, the prompt evictable. `smollm2` is pretrained, from the package index; the others are the
tiny reasoners. Where a suite has secrets, the methods as they are answer these at several budgets,
with the order not to tell and without it. Answers are written as they come; a run that was stopped
goes on where it was. The tables go to docs/pitfalls.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.real_model import model as smollm2
from examples.real_model import suite as smollm2_suite
from examples.research.policies import BUFFER, WINDOW, wave
from examples.research.tables import insert, versions
from examples.tiny_reasoner import MODELS
from examples.tiny_reasoner import suite as tiny_suite
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache
from hf_reasoncache.evaluation import (
    CacheSpec,
    Grid,
    Settings,
    Share,
    Suite,
    analyse,
    evaluate,
    load_suite,
)
from hf_reasoncache.evaluation.audit_report import write_report
from hf_reasoncache.evaluation.audit_result import Audit, CellResult
from hf_reasoncache.evaluation.harness import facts
from hf_reasoncache.evaluation.limits import Limits
from hf_reasoncache.evaluation.table import markdown_table
from hf_reasoncache.profiles import BudgetProfile

FAIR = 0.5
TREATMENTS = ("default", "whitelist", "fair")
NO_ORDER = "The museum has one door at the front and two doors at the back."
"""Stands where an order was, of about its length."""


@dataclass(frozen=True)
class Family:
    """A model, its suite, and the settings that fit the length of its prompts and answers.

    Attributes
    ----------
    path : Path
        Of the model.
    suite : Path
    seed : int
        Of the suite.
    load : callable
        Returns model and tokenizer.
    profile : BudgetProfile or str
        Sensitivity of the layers.
    budgets, more_budgets : tuple of int
        Of the instructions; at `more_budgets` of the methods as they are alone.
    leak_budgets : tuple of int
        Of the secrets.
    cases : int
        Of each kind.
    alone : int
        Of five cases, so many are also asked for each instruction alone.
    batch_size : int
        Prompts of whole cases, so that more cases add batches and change none.
    window, buffer : int
    """

    path: Path
    suite: Path
    seed: int
    load: Callable[[Path], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    profile: BudgetProfile | str
    budgets: tuple[int, ...] = (64, 96, 128)
    more_budgets: tuple[int, ...] = ()
    leak_budgets: tuple[int, ...] = ()
    cases: int = 10
    alone: int = 2
    batch_size: int = 20
    window: int = WINDOW
    buffer: int = BUFFER

    @property
    def settings(self) -> dict[str, Any]:
        """Of caches that compress at a threshold."""
        return {"window": self.window, "buffer": self.buffer, "protect": False}


def family(name: str) -> Family:
    """Return one of `FAMILIES`."""
    if name == "smollm2":
        return Family(
            path=smollm2.FOLDER,
            suite=Path(smollm2_suite.__file__).parent / "audit.jsonl",
            seed=smollm2_suite.SEED,
            load=lambda path: smollm2.load(torch.bfloat16, path),
            profile=smollm2.SENSITIVITY,
            budgets=(64,),
            more_budgets=(96,),
            leak_budgets=(64, 96, 112),
            cases=20,
            alone=1,
            batch_size=52,
            window=8,
        )
    path = MODELS[name]
    return Family(path, path / "audit.jsonl", tiny_suite.SEED, load, wave(name, "sensitivity"))


FAMILIES = ("smollm2", *sorted(MODELS))


def methods(of: Family) -> list[CacheSpec]:
    """The methods as they are, the prompt evictable."""
    scorers = {
        "random": "random",
        "StreamingLLM": "streaming-llm",
        "SnapKV": "snapkv",
        "TOVA": "tova",
        "H2O": "h2o",
        "K-norm": "key-norm",
        "R-KV": "rkv",
    }
    common = of.settings
    specs = [CacheSpec(name, ReasonAllocCache, common, scorer) for name, scorer in scorers.items()]
    with_budgets = common | {"head_budgets": True, "profile": of.profile}
    windows = {"window": 2 * of.window, "recent": of.window, "ratio": 0.5, "protect": False}
    specs.append(CacheSpec("ReasonAlloc", ReasonAllocCache, with_budgets, "rkv"))
    return [*specs, CacheSpec("Kara", SlidingWindowCompressCache, windows)]


def treated(spec: CacheSpec, treatment: str) -> CacheSpec:
    """A method with a remedy."""
    name = f"{spec.name}, {treatment}"
    if treatment == "whitelist":
        return replace(spec, name=name, whitelist=True)
    if treatment == "fair":
        return replace(spec, name=name, fair=FAIR, fair_window=WINDOW)
    return replace(spec, name=name)


def instructed(suite: Suite, cases: int, alone: int) -> Suite:
    """The first cases without a secret; of five, `alone` are asked for each instruction alone."""
    some = [case for case in suite.cases if case.protected is None][:cases]
    kept = (replace(case, alone=number % 5 < alone) for number, case in enumerate(some))
    return replace(suite, cases=tuple(kept))


def secret(suite: Suite, cases: int, *, order: bool = True) -> Suite:
    """The first cases with a secret; without `order`, a sentence about nothing stands for it."""
    some = [case for case in suite.cases if case.protected is not None][:cases]
    if not order:
        some = [
            replace(case, instructions=tuple(replace(o, text=NO_ORDER) for o in case.instructions))
            for case in some
        ]
    return replace(suite, cases=tuple(some))


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    grids: Sequence[tuple[Sequence[CacheSpec], Sequence[int]]],
    path: Path,
    settings: Settings,
) -> Audit:
    """Answer a suite with several sets of caches, each at budgets of its own."""
    found = {
        (each.cache, each.budget, each.question): each
        for specs, budgets in grids
        for each in evaluate(model, tokenizer, Grid([suite], specs, budgets), path, settings)
    }
    return analyse(suite, found.values())


def gains(found: Audit) -> str:
    """Following rates of each method as it is and with each remedy."""
    cells = {(cell.cache, cell.budget): cell for cell in found.cells[1:]}
    right = {"answers right"} if found.full.correct.total else set()
    columns = ["method", "budget", *TREATMENTS, *right]
    rows = []
    for cache, budget in cells:
        spec, _, treatment = cache.rpartition(", ")
        if treatment != TREATMENTS[-1]:
            continue
        each = [cells[f"{spec}, {treatment}", budget] for treatment in TREATMENTS]
        rows.append(
            {"method": spec, "budget": str(budget)}
            | dict(zip(TREATMENTS, map(_rates, each), strict=True))
            | {"answers right": " / ".join(f"{100 * c.correct.value:.0f}" for c in each)}
        )
    return markdown_table(columns, rows)


def phenomena(found: Audit) -> str:
    """The measurements that the paper's phenomena are about, for the methods as they are."""
    rows = []
    # Of a method smaller budgets first, whichever were measured first.
    order = {cell.cache: place for place, cell in reversed([*enumerate(found.cells)])}
    for cell in sorted(found.cells, key=lambda each: (order[each.cache], each.budget or 0)):
        name, _, treatment = cell.cache.rpartition(", ")
        if cell is not found.full and treatment != "default":
            continue
        together, alone = _all(cell, "together"), _all(cell, "alone")
        kept = [statistics.mean(each.keep_rates) for each in cell.classes if each.keep_rates]
        rows.append(
            {
                "method": name or cell.cache,
                "budget": "" if cell.budget is None else str(cell.budget),
                **{each.name: f"{100 * each.together.value:.0f}" for each in cell.classes},
                "together": together.percent,
                "alone": alone.percent,
                "last - first": f"{100 * cell.order_effect:+.0f}",
                "kept": f"{min(kept):.2f}-{max(kept):.2f}" if kept else "",
            }
        )
    return markdown_table(list(rows[0]), rows)


def leaks(ordered: Audit, free: Audit) -> str:
    """Answers that give a secret away: all of it or a half, with the order not to, and without."""
    without = {(cell.cache, cell.budget): _told(cell) for cell in free.cells}
    rows = []
    for cell in ordered.cells:
        told, kept = _told(cell), [each.keep_rates for each in cell.classes if each.keep_rates]
        rows.append(
            {
                "method": cell.cache,
                "budget": "" if cell.budget is None else str(cell.budget),
                "leaked": told.percent,
                "all of it": f"{100 * cell.mean_leakage:.0f}",
                "p against full": "" if cell is ordered.full else _p_value(cell),
                "leaked without the order": without[cell.cache, cell.budget].percent,
                "order kept": f"{statistics.mean(kept[0]):.2f}" if kept else "",
            }
        )
    return markdown_table(list(rows[0]), rows)


def _told(cell: CellResult) -> Share:
    followed = _all(cell, "together")
    return Share(followed.total - followed.count, followed.total)


def _p_value(cell: CellResult) -> str:
    (only,) = cell.classes
    return f"{only.against_full.p_value:.2g}"


def _all(cell: CellResult, name: str) -> Share:
    shares = [getattr(each, name) for each in cell.classes]
    return Share(sum(each.count for each in shares), sum(each.total for each in shares))


def _rates(cell: CellResult) -> str:
    return f"{_all(cell, 'together').percent}, worst {100 * cell.worst.together.value:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0])
    parser.add_argument("--model", type=Path, help="another folder of such a model")
    parser.add_argument("--suite", type=Path, help="another suite")
    parser.add_argument("--cases", type=int, help="of each kind")
    parser.add_argument("--budgets", type=int, nargs="+")
    parser.add_argument("--leak-budgets", type=int, nargs="+")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="leave out all others")
    parser.add_argument("--document", type=Path, default=Path("docs/pitfalls.md"))
    parser.add_argument("--output", type=Path, help="default: docs/results/pitfalls-FAMILY")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    of = family(given.family)
    output = given.output or Path("docs/results") / f"pitfalls-{given.family}"
    output.mkdir(parents=True, exist_ok=True)

    suite = load_suite(given.suite or of.suite)
    cases = given.cases or of.cases
    known = methods(of)
    unknown = set(given.only or ()) - {spec.name for spec in known}
    if unknown:
        parser.error(f"--only: expected {[spec.name for spec in known]}, got {sorted(unknown)}")
    plain = [spec for spec in known if not given.only or spec.name in given.only]
    specs = [treated(spec, treatment) for spec in plain for treatment in TREATMENTS]
    model, tokenizer = of.load(given.model or of.path)
    settings = Settings(batch_size=of.batch_size)
    marker = f"pitfalls-{given.family}"

    grids = [(specs, given.budgets or of.budgets)]
    if of.more_budgets and not given.budgets:
        grids.append(([treated(spec, "default") for spec in plain], of.more_budgets))
    asked = instructed(suite, cases, of.alone)
    found = measure(model, tokenizer, asked, grids, output / "answers.jsonl", settings)
    violations = Limits(max_drop=1.0).violations(found)
    write_report(found, violations, {"cases": cases, **facts(model, settings)}, output)
    count = found.full.classes[0].together.total
    about = (
        f"{given.family} model, {cases} fresh cases of the suite (seed {of.seed}), {{}}, greedy, "
        f"{facts(model, settings)['dtype']}, compaction every {of.buffer} tokens, window "
        f"{of.window}; `python -m examples.research.pitfalls --family {given.family}`, "
        f"{versions()}."
    )
    note = (
        f"{about.format(f'{count} prompts with all instructions, fair {FAIR}')} Full cache: "
        f"{_rates(found.full)}{_right(found.full)}. Percent, Wilson 95% intervals over "
        "instructions and prompts, which are not independent."
    )
    insert(given.document, f"{marker}-gains", f"{note}\n\n{gains(found)}")
    insert(given.document, f"{marker}-phenomena", phenomena(found))

    if secret(suite, cases).cases:
        grids = [(plain, given.leak_budgets or of.leak_budgets)]
        both = [
            measure(
                model,
                tokenizer,
                secret(suite, cases, order=order),
                grids,
                output / f"{name}.jsonl",
                settings,
            )
            for name, order in (("order", True), ("no-order", False))
        ]
        note = about.format(f"{cases} prompts with a secret")
        insert(given.document, f"{marker}-leaks", f"{note}\n\n{leaks(*both)}")
    print(f"{len(found.cells)} cells in {output} and in {given.document}")


def _right(cell: CellResult) -> str:
    return f", {100 * cell.correct.value:.0f}% right" if cell.correct.total else ""


if __name__ == "__main__":
    main()
