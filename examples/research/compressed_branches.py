"""Right answers of branches whose own tokens are evicted, at budgets where something is lost.

    python -m examples.research.compressed_branches --reasoner smollm2-short --budgets 144
    python -m examples.research.compressed_branches --reasoner smollm2-short --branches 4

Every branch shares its prompt, which is never evicted, and a budget counts it. With one branch
answers are greedy; several are sampled and vote. Every finished batch is written at once; a run
that was stopped goes on where it was.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.real_model.model import SENSITIVITY
from examples.research.arguments import parse
from examples.research.branch_recordings import Sampling, generate_arguments
from examples.research.reasoner_batches import (
    Key,
    answer_batches,
    batches_parser,
    seed_of,
    table_name,
)
from examples.research.reasoners import REASONERS, Reasoner, TinyReasoner, encode
from examples.research.tables import show, versions
from examples.research.timed_branches import watch_bytes
from examples.tiny_reasoner import MODELS
from hf_reasoncache import ReasonAllocCache, SharedBranchCache
from hf_reasoncache.branching import ConfidentExit, ExitRules
from hf_reasoncache.branching.generate import branch_generate
from hf_reasoncache.cache import CacheFactory
from hf_reasoncache.evaluation import Paired, Share
from hf_reasoncache.releases import cache_kwarg

FULL = "every token"
PROFILED, CHANCE = "R-KV, profile", "random, profile"
SCORERS = {PROFILED: "rkv", CHANCE: "random"}

# Chains are too short for the default buffer of 128.
COMMON = {"buffer": 16, "window": 8}


@dataclass(frozen=True)
class Batch:
    """What became of a batch of problems.

    Attributes
    ----------
    suffix : str
        `FULL` or one of `SCORERS`.
    budget : int
        Tokens, prompt included; 0 for `FULL`.
    task : str
    start : int
        The first problem of the batch.
    single : list of list of bool
        For each problem, which branches are right.
    voted : list of bool
        For each problem, whether the vote is right.
    bytes : int
        The most that the cache held, per branch.
    """

    suffix: str
    budget: int
    task: str
    start: int
    single: list[list[bool]]
    voted: list[bool]
    bytes: int

    @property
    def key(self) -> tuple[str, int, str, int]:
        """See `Journal`."""
        return self.suffix, self.budget, self.task, self.start


def make_suffix(reasoner: Reasoner, suffix: str, budget: int) -> CacheFactory | None:
    """How branches are compressed; None keeps every token."""
    if suffix == FULL:
        return None
    tiny = isinstance(reasoner, TinyReasoner)
    profile = MODELS[reasoner.name] / "sensitivity" if tiny else SENSITIVITY
    return ReasonAllocCache.policy(budget=budget, scorer=SCORERS[suffix], profile=profile, **COMMON)


@torch.inference_mode()
def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Any],
    sampling: Sampling,
    suffix: CacheFactory | None,
) -> dict[str, Any]:
    """Answer some problems; return what a `Batch` has."""
    reasoner, branches = sampling.reasoner, sampling.branches
    rules = ExitRules(consensus=None)
    exit = ConfidentExit(reasoner.read_answer, branches=branches, tokenizer=tokenizer, rules=rules)
    cache = SharedBranchCache(model.config, suffix=suffix)
    how = generate_arguments(sampling)
    if branches == 1:
        how = {"do_sample": False, "max_new_tokens": reasoner.max_new_tokens}
    torch.manual_seed(0)
    with watch_bytes(model, cache) as held:
        branch_generate(
            model,
            encode(reasoner, tokenizer, problems),
            num_branches=branches,
            stopping_criteria=[exit],
            **cache_kwarg(cache),
            **how,
        )
    votes = exit.results()
    return {
        "single": [
            [reasoner.is_right(problem, each.answer) for each in vote.branches]
            for problem, vote in zip(problems, votes, strict=True)
        ],
        "voted": [
            reasoner.is_right(problem, vote.answer)
            for problem, vote in zip(problems, votes, strict=True)
        ],
        "bytes": max(held) // (len(problems) * branches),
    }


def table(batches: Sequence[Batch]) -> list[dict[str, str]]:
    """One row for each way to compress and budget, in the order in which they were run."""
    groups: dict[tuple[str, int], list[Batch]] = {}
    for each in batches:
        groups.setdefault((each.suffix, each.budget), []).append(each)
    voted = {key: [mark for each in some for mark in each.voted] for key, some in groups.items()}
    rows = []
    for (suffix, budget), some in groups.items():
        right = voted[suffix, budget]
        singles = [mark for each in some for marks in each.single for mark in marks]
        row = {"own tokens": suffix, "budget": str(budget or "")}
        if len(singles) > len(right):
            row["single branch"] = f"{100 * statistics.mean(singles):.1f}"
        row["right"] = Share.of(right).percent
        for name, key in (("every token", (FULL, 0)), ("random", (CHANCE, budget))):
            row[f"against {name}: lost, gained (p)"] = ""
            if key in voted and key != (suffix, budget):
                paired = Paired.of(voted[key], right)
                row[f"against {name}: lost, gained (p)"] = (
                    f"{paired.lost}, {paired.gained} ({paired.p_value:.2g})"
                )
        row["KiB per branch"] = f"{statistics.mean(each.bytes for each in some) / 1024:.0f}"
        rows.append(row)
    return rows


def main() -> None:
    """Run what is missing, then write the table."""
    made = batches_parser(__doc__, "branches.md", batch=50)
    made.add_argument("--budgets", type=int, nargs="+", default=[144])
    made.add_argument("--temperature", type=float, default=1.3)
    arguments = parse(made)
    seed, name = seed_of(arguments, 900), table_name(arguments, "compressed_branches")
    reasoner = REASONERS[arguments.reasoner]
    sampling = Sampling(reasoner, arguments.temperature, arguments.branches, arguments.batch)
    ways = [(suffix, budget) for budget in arguments.budgets for suffix in SCORERS]

    def make(
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, key: Key, some: Sequence[Any]
    ) -> Batch:
        compressed = make_suffix(reasoner, *key[:2])
        return Batch(*key, **run(model, tokenizer, some, sampling, compressed))

    settings = {"temperature": arguments.temperature}
    rows = table(answer_batches(arguments, name, seed, [(FULL, 0), *ways], Batch, settings, make))
    way = "greedy"
    if arguments.branches > 1:
        way = f"the vote of {arguments.branches} branches at temperature {arguments.temperature:g}"
    note = (
        f"{reasoner.title}, {arguments.problems} "
        f"{'development' if arguments.development else 'fresh'} problems of all tasks (seed "
        f"{seed}), {way}. Percent, Wilson 95% intervals; p: McNemar's exact test; KiB: the most "
        f"that all of a batch held, over its branches, one prompt each. Buffer {COMMON['buffer']}, "
        f"window {COMMON['window']}. {versions()}."
    )
    show(rows, note, name, arguments)


if __name__ == "__main__":
    main()
