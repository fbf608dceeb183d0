"""The phenomena of "The Pitfalls of KV Cache Compression" on a tiny reasoner, and its remedies.

    python -m examples.research.pitfalls

Eight methods and the random control, each as it is, with the instructions protected, and with fair
eviction, on the reasoner's audit suite, the prompt evictable. Every answer is written at once; a
run that was stopped goes on where it was. The tables go to docs/audit.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from examples.research.policies import BUFFER, WINDOW, wave
from examples.research.tables import insert, versions
from examples.tiny_reasoner import MODELS, TEST_SEEDS
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache
from hf_reasoncache.evaluation import CacheSpec, Settings, Share, Suite, audit, load_suite
from hf_reasoncache.evaluation.audit_report import write_report
from hf_reasoncache.evaluation.audit_result import Audit, CellResult
from hf_reasoncache.evaluation.harness import facts
from hf_reasoncache.evaluation.limits import Limits
from hf_reasoncache.evaluation.table import markdown_table

BUDGETS = (64, 96, 128)
FAIR = 0.5
BATCH = 20
"""Prompts of five cases, so that more cases add batches and change none."""

TREATMENTS = ("default", "whitelist", "fair")


def methods(family: str) -> list[CacheSpec]:
    """The methods as they are, the prompt evictable."""
    common = {"window": WINDOW, "buffer": BUFFER, "protect": False}
    scorers = {
        "random": "random",
        "StreamingLLM": "streaming-llm",
        "SnapKV": "snapkv",
        "TOVA": "tova",
        "H2O": "h2o",
        "K-norm": "key-norm",
        "R-KV": "rkv",
    }
    specs = [CacheSpec(name, ReasonAllocCache, common, scorer) for name, scorer in scorers.items()]
    profile = wave(family, "sensitivity")
    with_budgets = common | {"head_budgets": True, "profile": profile}
    windows = {"window": 2 * WINDOW, "recent": WINDOW, "ratio": 0.5, "protect": False}
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


def shortened(suite: Suite, cases: int) -> Suite:
    """The first cases; of two in five, each instruction is asked alone as well."""
    kept = (replace(case, alone=number % 5 < 2) for number, case in enumerate(suite.cases[:cases]))
    return replace(suite, cases=tuple(kept))


def gains(found: Audit) -> str:
    """Following rates of each method as it is and with each remedy."""
    cells = {(cell.cache, cell.budget): cell for cell in found.cells[1:]}
    columns = ["method", "budget", *TREATMENTS, "answers right"]
    rows = []
    for spec in dict.fromkeys(cell.cache.rpartition(", ")[0] for cell in found.cells[1:]):
        for budget in dict.fromkeys(cell.budget for cell in found.cells[1:]):
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
    for cell in found.cells[1:]:
        name, _, treatment = cell.cache.rpartition(", ")
        if treatment != "default":
            continue
        together, alone = _all(cell, "together"), _all(cell, "alone")
        kept = [statistics.mean(each.keep_rates) for each in cell.classes]
        rows.append(
            {
                "method": name,
                "budget": str(cell.budget),
                **{each.name: f"{100 * each.together.value:.0f}" for each in cell.classes},
                "together": together.percent,
                "alone": alone.percent,
                "last - first": f"{100 * cell.order_effect:+.0f}",
                "kept": f"{min(kept):.2f}-{max(kept):.2f}",
            }
        )
    return markdown_table(list(rows[0]), rows)


def _all(cell: CellResult, name: str) -> Share:
    shares = [getattr(each, name) for each in cell.classes]
    return Share(sum(each.count for each in shares), sum(each.total for each in shares))


def _rates(cell: CellResult) -> str:
    return f"{_all(cell, 'together').percent}, worst {100 * cell.worst.together.value:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(MODELS), default="llama")
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="leave out all others")
    parser.add_argument("--document", type=Path, default=Path("docs/audit.md"))
    parser.add_argument("--output", type=Path, help="default: docs/results/pitfalls-FAMILY")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    output = given.output or Path("docs/results") / f"pitfalls-{given.family}"
    output.mkdir(parents=True, exist_ok=True)

    path = MODELS[given.family]
    suite = shortened(load_suite(path / "audit.jsonl"), given.cases)
    known = methods(given.family)
    unknown = set(given.only or ()) - {spec.name for spec in known}
    if unknown:
        parser.error(f"--only: expected {[spec.name for spec in known]}, got {sorted(unknown)}")
    specs = [
        treated(spec, treatment)
        for spec in known
        if not given.only or spec.name in given.only
        for treatment in TREATMENTS
    ]
    model, tokenizer = load(path)
    settings = Settings(batch_size=BATCH)
    found = audit(model, tokenizer, suite, specs, given.budgets, output / "answers.jsonl", settings)
    violations = Limits(max_drop=1.0).violations(found)
    write_report(found, violations, {"cases": given.cases, **facts(model, settings)}, output)
    count = found.full.classes[0].together.total
    note = (
        f"{given.family} model, {given.cases} fresh problems of the suite (seed {TEST_SEEDS[400]})"
        f", {count} prompts with all five instructions, greedy, float32, compaction every {BUFFER} "
        f"tokens, window {WINDOW}, fair {FAIR}; {versions()}. "
        f"Full cache: "
        f"{_rates(found.full)}, {100 * found.full.correct.value:.0f}% right. Percent, Wilson 95% "
        "intervals over instructions and prompts, which are not independent."
    )
    insert(given.document, "pitfalls-gains", f"{note}\n\n{gains(found)}")
    insert(given.document, "pitfalls-phenomena", phenomena(found))
    print(f"{len(found.cells)} cells in {output} and in {given.document}")


if __name__ == "__main__":
    main()
