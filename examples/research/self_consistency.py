"""Self-consistency with early exit on a reasoner: what it saves, and what it gets wrong.

    python -m examples.research.self_consistency --reasoner smollm2-short

Draws some branches of every problem, calibrates exit rules on development problems, and judges them
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

from transformers import PreTrainedTokenizerBase

from examples.benchmarks.machine import Machine
from examples.research.arguments import parse, reasoner_parser
from examples.research.branch_recordings import GROUP, Sampling, record_branches
from examples.research.branch_tables import (
    Judge,
    Point,
    draw,
    line,
    saved_interval,
    single,
    timing,
    votes_by_branches,
)
from examples.research.reasoners import REASONERS, Reasoner, mixed
from examples.research.tables import publish, versions
from examples.research.timed_branches import live_methods, time_methods
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, TEST_SEEDS
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

CALIBRATION_SEED = DEVELOPMENT_SEEDS[600]
TIMED_SEED = DEVELOPMENT_SEEDS[700]
LEVELS = (1.0, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
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


@dataclass(frozen=True)
class Setting:
    """What all ways to vote have in common.

    Attributes
    ----------
    reasoner : Reasoner
    tokenizer : PreTrainedTokenizerBase
    stage : int
        Branches that start at a time.
    target : float
        Largest rate of changed votes.
    """

    reasoner: Reasoner
    tokenizer: PreTrainedTokenizerBase
    stage: int
    target: float


def calibrate(held_out: Sequence[Recording], setting: Setting) -> dict[str, ExitCalibration | str]:
    """Calibrate every kind of exit; where nothing passes, say why."""
    searches: dict[str, dict[str, Any]] = {
        "consensus": {"candidates": None},
        "consensus, stages": {"candidates": None, "stage": setting.stage},
        "weak": {"candidates": weak_candidates(held_out, ExitRules(group=GROUP))},
    }
    if setting.reasoner.guess is not None:
        searches["decode"] = {
            "candidates": decode_candidates(ExitRules(DecodeExit(), None, None, GROUP)),
            "answer": setting.reasoner.guess,
            "tokenizer": setting.tokenizer,
        }
    found: dict[str, ExitCalibration | str] = {}
    for name, arguments in searches.items():
        try:
            found[name] = calibrate_exit(held_out, target=setting.target, **arguments)
        except ValueError as error:
            found[name] = str(error)
    return found


def methods(found: dict[str, ExitCalibration | str], setting: Setting) -> list[Method]:
    """List the ways to vote, those without exit first."""
    stage, target = setting.stage, setting.target
    certain = ExitRules(group=GROUP)
    in_stages = partial(replay, rules=certain, stage=stage)
    paper = ExitRules(DecodeExit(), None, None, GROUP)
    made = [
        Method("all branches, majority", partial(replay, rules=NOTHING)),
        Method("all, sqrt(confidence)", partial(replay, rules=NOTHING, weight=sqrt_confidence)),
        Method("all, group confidence", partial(replay, rules=NOTHING, weight=group_confidence)),
        Method("certain consensus", partial(replay, rules=certain), 0.0),
        Method(f"certain consensus, stages of {stage}", in_stages, 0.0),
    ]
    names = {
        "consensus": "calibrated consensus",
        "consensus, stages": f"calibrated consensus, stages of {stage}",
        "weak": "certain consensus + weak exit, calibrated",
    }
    for key, name in names.items():
        rules = found[key]
        if isinstance(rules, ExitCalibration):
            made.append(Method(name, partial(replay, rules=rules.rules, stage=rules.stage), target))
    bold = ExitRules(consensus=ConsensusExit(0.8), group=GROUP)
    in_bold_stages = partial(replay, rules=bold, stage=stage)
    made.append(Method(f"consensus 0.8, stages of {stage}", in_bold_stages))
    every_step = replace(paper, decode=DecodeExit(every=1))
    read = partial(replay, answer=setting.reasoner.read_answer, tokenizer=setting.tokenizer)
    made.append(Method("RKSC's decode exit on an answer", partial(read, rules=every_step)))
    if setting.reasoner.guess is not None:
        guess = partial(replay, answer=setting.reasoner.guess, tokenizer=setting.tokenizer)
        made.append(Method("RKSC's decode exit, last number", partial(guess, rules=paper)))
        decode = found["decode"]
        if isinstance(decode, ExitCalibration):
            name = "decode exit, last number, calibrated"
            made.append(Method(name, partial(guess, rules=decode.rules), target))
    return made


def curves(recordings: Sequence[Recording], judge: Judge, stage: int) -> dict[str, list[Point]]:
    """Return what levels of consensus cost and save, with stages and without."""
    full = replay(recordings, NOTHING)
    found: dict[str, list[Point]] = {}
    for name, each in (("all at once", None), (f"stages of {stage}", stage), ("one by one", 1)):
        found[name] = []
        for level in LEVELS:
            rules = ExitRules(consensus=ConsensusExit(level), group=GROUP)
            votes = replay(recordings, rules, stage=each)
            right = judge([vote.answer for vote in votes])
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
    made = reasoner_parser(__doc__, "votes.md", problems=100)
    made.add_argument("--held-out", type=int, default=60, help="development problems")
    made.add_argument("--branches", type=int, default=8)
    made.add_argument("--temperature", type=float, default=1.3)
    made.add_argument("--batch", type=int, default=30, help="problems that are drawn together")
    made.add_argument("--target", type=float, default=0.05, help="largest rate of changed votes")
    made.add_argument("--timed", type=int, default=6, help="problems to run live, 0 for none")
    made.add_argument("--recordings", type=Path, default=Path("recordings"))
    arguments = parse(made)
    machine = Machine.here(TEST_SEEDS[0])
    reasoner, target = REASONERS[arguments.reasoner], arguments.target
    model, tokenizer = reasoner.load()
    sampling = Sampling(reasoner, arguments.temperature, arguments.branches, arguments.batch)
    setting = Setting(reasoner, tokenizer, max(1, arguments.branches // 4), target)

    def record(problems: dict[str, list[Any]], seed: int) -> list[Recording]:
        folder = sampling.folder(arguments.recordings, seed)
        return record_branches(model, tokenizer, problems, sampling, folder, seed)

    fresh_problems = mixed(reasoner, arguments.problems, TEST_SEEDS[0])
    fresh = record(fresh_problems, TEST_SEEDS[0])
    held_out = record(mixed(reasoner, arguments.held_out, CALIBRATION_SEED), CALIBRATION_SEED)
    judge = Judge(reasoner, [each for some in fresh_problems.values() for each in some])
    found = calibrate(held_out, setting)
    full = replay(fresh, NOTHING)
    rows = [
        line(method.name, method.votes(fresh), full, judge, method.target)
        for method in methods(found, setting)
    ]
    name = f"self_consistency-{reasoner.name}"
    right = Share.of(judge([each.answer for each in full]))
    picture = arguments.output / f"{name}.png"
    draw(picture, curves(fresh, judge, setting.stage), right, target)
    described = (
        f"{reasoner.title}, {len(fresh)} fresh problems of all tasks (seed {TEST_SEEDS[0]}), "
        f"{arguments.branches} branches at temperature {arguments.temperature:g}"
    )
    notes = [
        f"{described}; calibrated on {len(held_out)} development problems (seed "
        f"{CALIBRATION_SEED}) to at most {target:.0%} changed votes at 95% confidence. A single "
        f"branch is right in {single(fresh, judge)}%. Percent, Wilson 95% intervals; tokens "
        f"saved: bootstrap over problems. {versions()}.",
        "Calibrated:",
        "\n".join(f"- {key}: {describe(each)}" for key, each in found.items()),
    ]
    for key, each in found.items():
        if isinstance(each, ExitCalibration):
            each.save(arguments.output / f"exit-{reasoner.name}-{key.replace(', ', '-')}.json")
    publish(rows, "\n\n".join(notes), name, arguments.output, arguments.document)
    note = (
        f"{described}. Percent of right votes, mean over disjoint groups of the branches; "
        f"bootstrap 95% intervals over problems. Of two answers with equal weight the first "
        f"counts. {versions()}."
    )
    by_branches = votes_by_branches(fresh, judge)
    publish(by_branches, note, f"votes-{reasoner.name}", arguments.output, arguments.document)
    if arguments.timed:
        stages = found["consensus, stages"]
        rules = stages.rules if isinstance(stages, ExitCalibration) else ExitRules(group=GROUP)
        problems = mixed(reasoner, arguments.timed, TIMED_SEED)
        some = [each for task in problems.values() for each in task]
        live = live_methods(rules, setting.stage)
        timings = time_methods(model, tokenizer, some, sampling, live, TIMED_SEED)
        note = (
            f"{reasoner.title}, {len(timings[0].seconds)} problems (seed {TIMED_SEED}), one at a "
            f"time; CPU time on {arguments.threads} core(s); MB: most that the caches held, mean "
            f"over problems. {machine}"
        )
        timed = timing(timings, Judge(reasoner, some))
        publish(timed, note, f"{name}-time", arguments.output, arguments.document)


if __name__ == "__main__":
    main()
