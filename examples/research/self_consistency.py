"""Self-consistency with early exit on the tiny reasoners: what it saves, and what it gets wrong.

    python -m examples.research.self_consistency --family llama

Draws 16 branches of every problem, calibrates exit rules on development problems, and judges them
on fresh ones: accuracy of the vote, tokens saved, and how often exit changed the vote, beside the
rate that was asked for. Branches are kept in --recordings and drawn once. --timed measures time by
running each method live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from examples.benchmarks.machine import Machine
from examples.research.arguments import parse, parser
from examples.research.branch_recordings import GROUP, Sampling, mixed, record_branches
from examples.research.branch_tables import (
    Point,
    draw,
    line,
    saved_interval,
    single,
    timing,
)
from examples.research.tables import publish
from examples.research.timed_branches import live_methods, time_methods
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, TEST_SEEDS, read_answer
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache.branching import (
    ConsensusExit,
    DecodeExit,
    ExitCalibration,
    ExitRules,
    VoteResult,
    calibrate_exit,
)
from hf_reasoncache.branching.calibrate import decode_candidates, weak_candidates
from hf_reasoncache.branching.recording import Recording, replay
from hf_reasoncache.branching.vote import group_confidence, sqrt_confidence
from hf_reasoncache.evaluation import Share

STAGE = 4
CALIBRATION_SEED = DEVELOPMENT_SEEDS[600]
LEVELS = (1.0, 0.99, 0.95, 0.9, 0.8)
NOTHING = ExitRules(consensus=None, group=GROUP)


@dataclass(frozen=True)
class Method:
    """One way to vote.

    Attributes
    ----------
    name : str
    votes : Callable
        From recordings to votes.
    target : float or None
        Error rate that its rules were calibrated to; 0 for those that cannot err.
    """

    name: str
    votes: Callable[[Sequence[Recording]], list[VoteResult]]
    target: float | None = None


def last_number(text: str) -> str | None:
    """Read the last digit that stands alone, wherever the chain of thought is by then."""
    return next((word for word in reversed(text.split()) if word.isdigit()), None)


def calibrate(
    held_out: Sequence[Recording], target: float, tokenizer: PreTrainedTokenizerBase
) -> dict[str, ExitCalibration | str]:
    """Calibrate every kind of exit; where nothing passes, say why."""
    steps = ExitRules(DecodeExit(), None, None, GROUP)
    searches: dict[str, dict[str, Any]] = {
        "consensus": {"candidates": None},
        "consensus, stages": {"candidates": None, "stage": STAGE},
        "weak": {"candidates": weak_candidates(held_out, ExitRules(group=GROUP))},
        "decode": {
            "candidates": decode_candidates(steps),
            "answer": last_number,
            "tokenizer": tokenizer,
        },
    }
    found: dict[str, ExitCalibration | str] = {}
    for name, arguments in searches.items():
        try:
            found[name] = calibrate_exit(held_out, target=target, **arguments)
        except ValueError as error:
            found[name] = str(error)
    return found


def methods(
    found: dict[str, ExitCalibration | str], target: float, tokenizer: PreTrainedTokenizerBase
) -> list[Method]:
    """List the ways to vote, those without exit first."""
    certain = ExitRules(group=GROUP)
    in_stages = partial(replay, rules=certain, stage=STAGE)
    paper = ExitRules(DecodeExit(), None, None, GROUP)
    on_last_number = partial(replay, answer=last_number, tokenizer=tokenizer)
    made = [
        Method("all branches, majority", partial(replay, rules=NOTHING)),
        Method("all, sqrt(confidence)", partial(replay, rules=NOTHING, weight=sqrt_confidence)),
        Method("all, group confidence", partial(replay, rules=NOTHING, weight=group_confidence)),
        Method("certain consensus", partial(replay, rules=certain), 0.0),
        Method(f"certain consensus, stages of {STAGE}", in_stages, 0.0),
    ]
    names = {
        "consensus": "calibrated consensus",
        "consensus, stages": f"calibrated consensus, stages of {STAGE}",
        "weak": "certain consensus + weak exit, calibrated",
    }
    for key, name in names.items():
        rules = found[key]
        if isinstance(rules, ExitCalibration):
            made.append(Method(name, partial(replay, rules=rules.rules, stage=rules.stage), target))
    bold = ExitRules(consensus=ConsensusExit(0.8), group=GROUP)
    in_bold_stages = partial(replay, rules=bold, stage=STAGE)
    made.append(Method(f"consensus 0.8, stages of {STAGE}", in_bold_stages))
    made.append(Method("RKSC's decode exit on ANS", partial(_until_answer, paper, tokenizer)))
    made.append(Method("RKSC's decode exit, last number", lambda some: on_last_number(some, paper)))
    decode = found["decode"]
    if isinstance(decode, ExitCalibration):
        made.append(
            Method(
                "decode exit, last number, calibrated",
                lambda some: on_last_number(some, decode.rules),
                target,
            )
        )
    return made


def _until_answer(
    rules: ExitRules, tokenizer: PreTrainedTokenizerBase, recordings: Sequence[Recording]
) -> list[VoteResult]:
    every = replace(rules, decode=replace(rules.decode or DecodeExit(), every=1))
    return replay(recordings, every, answer=read_answer, tokenizer=tokenizer)


def curves(recordings: Sequence[Recording], truth: Sequence[str]) -> dict[str, list[Point]]:
    """Return what levels of consensus cost and save, with stages and without."""
    full = replay(recordings, NOTHING)
    found: dict[str, list[Point]] = {}
    for name, stage in (("all at once", None), (f"stages of {STAGE}", STAGE), ("one by one", 1)):
        found[name] = []
        for level in LEVELS:
            rules = ExitRules(consensus=ConsensusExit(level), group=GROUP)
            votes = replay(recordings, rules, stage=stage)
            right = [each.answer == answer for each, answer in zip(votes, truth, strict=True)]
            changed = [a.answer != b.answer for a, b in zip(votes, full, strict=True)]
            saved = saved_interval(votes, full)[0]
            found[name].append(Point(level, saved, Share.of(right), Share.of(changed)))
    return found


def describe(found: ExitCalibration | str) -> str:
    """Say which rules passed, or why none did."""
    if isinstance(found, str):
        return f"none: {found}"
    rules = found.rules
    parts = [
        f"consensus {rules.consensus.confidence:g}" if rules.consensus else "",
        f"weak below {rules.weak.threshold:.2f} nats" if rules.weak else "",
        f"decode at {rules.decode.confidence:g}" if rules.decode else "",
    ]
    last = next(each for each in reversed(found.tried) if each.rules == rules)
    return f"{', '.join(filter(None, parts))} ({last})"


def main() -> None:
    """Draw what is missing, calibrate, judge, and write tables and plot."""
    made = parser(__doc__, "self_consistency.md", problems=200, of="fresh ones, of all tasks")
    made.add_argument("--held-out", type=int, default=120, help="development problems")
    made.add_argument("--branches", type=int, default=16)
    made.add_argument("--temperature", type=float, default=1.0)
    made.add_argument("--target", type=float, default=0.05, help="largest rate of changed votes")
    made.add_argument("--timed", type=int, default=30, help="problems to run live, 0 for none")
    made.add_argument("--recordings", type=Path, default=Path("recordings"))
    arguments = parse(made)
    machine = Machine.here(TEST_SEEDS[0])
    family, target = arguments.family, arguments.target
    model, tokenizer = load(MODELS[family])
    sampling = Sampling(family, arguments.temperature, arguments.branches)

    def record(count: int, seed: int) -> list[Recording]:
        folder = sampling.folder(arguments.recordings, seed)
        return record_branches(model, tokenizer, mixed(count, seed, family), sampling, folder, seed)

    held_out = record(arguments.held_out, CALIBRATION_SEED)
    fresh = record(arguments.problems, TEST_SEEDS[0])
    problems = [
        each for some in mixed(arguments.problems, TEST_SEEDS[0], family).values() for each in some
    ]
    truth = [problem.answer for problem in problems]
    found = calibrate(held_out, target, tokenizer)
    full = replay(fresh, NOTHING)
    rows = [
        line(method.name, method.votes(fresh), full, truth, method.target)
        for method in methods(found, target, tokenizer)
    ]
    name = f"self_consistency-{family}"
    right = Share.of([each.answer == answer for each, answer in zip(full, truth, strict=True)])
    draw(arguments.output / f"{name}.png", curves(fresh, truth), right, target)
    notes = [
        f"{family} model, {len(fresh)} fresh problems of all tasks (seed {TEST_SEEDS[0]}), "
        f"{arguments.branches} branches at temperature {arguments.temperature:g}; calibrated on "
        f"{len(held_out)} development problems (seed {CALIBRATION_SEED}) to at most "
        f"{target:.0%} changed votes at 95% confidence. A single branch is right in "
        f"{single(fresh, truth)}%. Percent, Wilson 95% intervals; tokens saved: bootstrap over "
        f"problems. float32, torch {torch.__version__}.",
        "Calibrated:",
        "\n".join(f"- {key}: {describe(each)}" for key, each in found.items()),
    ]
    for key, each in found.items():
        if isinstance(each, ExitCalibration):
            each.save(arguments.output / f"exit-{family}-{key.replace(', ', '-')}.json")
    publish(rows, "\n\n".join(notes), name, arguments.output, arguments.document)
    if arguments.timed:
        stages = found["consensus, stages"]
        rules = stages.rules if isinstance(stages, ExitCalibration) else ExitRules(group=GROUP)
        seed = DEVELOPMENT_SEEDS[700]
        some = [each for task in mixed(arguments.timed, seed, family).values() for each in task]
        timings = time_methods(model, tokenizer, some, sampling, live_methods(rules, STAGE), seed)
        timed = timing(timings, [problem.answer for problem in some])
        note = (
            f"{family} model, {len(timings[0].seconds)} problems (seed {seed}), one at a time; CPU "
            f"time on {arguments.threads} core(s). {machine}"
        )
        publish(timed, note, f"{name}-time", arguments.output, arguments.document)


if __name__ == "__main__":
    main()
