"""Policy x budget on the tiny reasoners: the tables of docs/results.md.

Every finished line is written at once; a run that was stopped goes on where it was. The test
problems have never been used for a choice; the table "sweep" compares settings on the development
problems instead.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from examples.research.harness import FULL, Arm, Summary, run_arm, summarize
from examples.research.policies import BUFFER, TABLES, WINDOW, make_arm
from examples.research.tables import insert, markdown, read_csv, write_csv
from examples.tiny_reasoner import (
    DEVELOPMENT_SEEDS,
    MODELS,
    TASKS,
    TEST_SEEDS,
    make_problems,
)
from examples.tiny_reasoner.evaluate import load


def line(budget: str, prompt: str, policy: str, summary: Summary) -> dict[str, str]:
    """One row of the table."""
    final = summary.followed.get("FINAL")
    return {
        "budget": budget,
        "prompt": prompt,
        "policy": policy,
        **{task: share.percent for task, share in summary.by_task.items()},
        "all": summary.correct.percent,
        "finished": f"{100 * summary.finished:.1f}",
        "length": f"{summary.length:.0f}",
        "FINAL": "" if final is None else f"{100 * final.value:.1f}",
        "KiB/row": f"{summary.kib:.0f}",
    }


def todo(arguments: argparse.Namespace) -> Iterator[tuple[str, str, Arm]]:
    """Yield budget, prompt treatment and arm of every line."""
    yield "full", "kept", FULL
    table = TABLES[arguments.table](arguments.family)
    unknown = set(arguments.only or ()) - set(table)
    if unknown:
        raise ValueError(f"--only: expected names among {list(table)}, got {sorted(unknown)}.")
    table = {name: table[name] for name in arguments.only or table}
    for protect, budgets in ((True, arguments.protected), (False, arguments.unprotected)):
        for budget in budgets:
            for name, settings in table.items():
                prompt = "kept" if protect else "evictable"
                yield str(budget), prompt, make_arm(name, settings, budget, protect)


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=sorted(MODELS), required=True)
    parser.add_argument("--problems", type=int, default=200, help="of each task")
    parser.add_argument("--protected", type=int, nargs="*", default=[], metavar="BUDGET")
    parser.add_argument("--unprotected", type=int, nargs="*", default=[], metavar="BUDGET")
    parser.add_argument("--only", nargs="+", metavar="POLICY", help="leave out all others")
    parser.add_argument("--table", choices=TABLES, default="policies")
    parser.add_argument("--document", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = f"{arguments.table}-{arguments.family}"
    is_sweep = arguments.table == "sweep"
    # Other problems than the ones that the calibration and the demo use.
    seed = DEVELOPMENT_SEEDS[100] if is_sweep else TEST_SEEDS[0]
    path = arguments.output / f"{name}.csv"
    rows = read_csv(path)
    done = {(row["budget"], row["prompt"], row["policy"]) for row in rows}
    missing = [item for item in todo(arguments) if (item[0], item[1], item[2].name) not in done]

    model, tokenizer = load(MODELS[arguments.family])
    problems = {
        task: make_problems(task, arguments.problems, seed, arguments.family) for task in TASKS
    }
    with tqdm(total=len(missing) * len(TASKS) * arguments.problems, unit="problem") as progress:
        for budget, prompt, arm in missing:
            progress.set_description(f"{arm.name} {budget}")
            runs = {
                task: run_arm(model, tokenizer, some, arm, batch_size=100, progress=progress)
                for task, some in problems.items()
            }
            rows.append(line(budget, prompt, arm.name, summarize(runs)))
            write_csv(path, rows)
    kind = "development" if is_sweep else "fresh test"
    note = (
        f"{arguments.family} model, {arguments.problems} {kind} problems of each task (seed "
        f"{seed}), greedy, float32, compaction every {BUFFER} tokens, window {WINDOW} unless said "
        f"otherwise; {platform.machine()} CPU, torch {torch.__version__}, "
        f"transformers {transformers.__version__}. Percent, Wilson 95% intervals."
    )
    insert(arguments.document, name, markdown(rows, note))
    print(f"{len(rows)} lines in {path} and in {arguments.document}")


if __name__ == "__main__":
    main()
