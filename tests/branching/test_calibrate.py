"""Thresholds calibrated on simulated branches, whose error rate is known."""

import dataclasses
import json
import random

import pytest
import torch

from hf_reasoncache.branching import (
    Branch,
    ConsensusExit,
    DecodeExit,
    ExitCalibration,
    ExitRules,
    Reason,
    calibrate_exit,
)
from hf_reasoncache.branching.calibrate import (
    decode_candidates,
    measure_exit,
    weak_candidates,
)
from hf_reasoncache.branching.recording import Recording, replay
from hf_reasoncache.branching.staged_vote import staged_vote

BRANCHES = 8
NOTHING = ExitRules(consensus=None, group=4)


def simulated(problems, seed, accuracy=0.7):
    """Branches that answer alike or not, of any length, sure where they are right."""
    generator = random.Random(seed)
    found = []
    for _ in range(problems):
        skill = min(1.0, max(0.0, generator.gauss(accuracy, 0.2)))
        right = [generator.random() < skill for _ in range(BRANCHES)]
        lengths = [generator.randint(6, 14) for _ in range(BRANCHES)]
        answers = ["1" if each else str(generator.randint(2, 4)) for each in right]
        confidence = []
        for each, length in zip(right, lengths, strict=True):
            top1 = torch.tensor([generator.betavariate(9 if each else 4, 2) for _ in range(length)])
            confidence.append(torch.stack([top1, (1 - top1) / 2, 10 * top1], -1))
        found.append(
            Recording(
                ids=tuple(
                    torch.tensor([int(a)] * n) for a, n in zip(answers, lengths, strict=True)
                ),
                confidence=tuple(confidence),
                answers=tuple(answers),
                ended=(True,) * BRANCHES,
            )
        )
    return found


def test_the_target_holds_on_other_problems_as_often_as_promised():
    """20 calibrations, each judged on many other problems: 5% of them may miss, plus luck."""
    candidates = [ExitRules(consensus=ConsensusExit(c), group=4) for c in (1.0, 0.9, 0.8, 0.7)]
    others = simulated(1000, seed=10_000)
    rates = {rules: measure_exit(others, rules).error for rules in candidates}
    assert min(rates.values()) == 0 and max(rates.values()) > 0.15
    missed = sum(
        rates[calibrate_exit(simulated(50, seed), target=0.1, candidates=candidates).rules] > 0.1
        for seed in range(20)
    )
    assert missed <= 4  # binomial(20, 0.05) exceeds 4 with probability 0.3%


def test_it_goes_as_far_as_the_target_allows():
    recordings = simulated(200, seed=1)
    strict, loose = (calibrate_exit(recordings, target=t) for t in (0.02, 0.2))
    assert strict.rules.consensus.confidence > loose.rules.consensus.confidence
    assert strict.tried == loose.tried[: len(strict.tried)]
    passed = [each for each in loose.tried if each.bound <= 0.2]
    assert loose.rules == passed[-1].rules and len(loose.tried) - len(passed) == 1
    assert loose.tried[-1].errors > 0
    assert [each.saved for each in loose.tried] == sorted(each.saved for each in loose.tried)
    assert loose.tried[0].errors == 0  # certain


def test_weak_and_decode_exits_are_calibrated_too():
    recordings = simulated(100, seed=2)
    rules = weak_candidates(recordings, NOTHING, shares=(0.0, 0.1, 0.3))
    thresholds = [each.weak.threshold for each in rules]
    assert thresholds == sorted(thresholds)
    weak = calibrate_exit(recordings, candidates=rules, target=0.2)
    assert weak.rules.weak is not None and weak.tried[1].saved > weak.tried[0].saved == 0

    def answer(ids):
        return str(int(ids[-1]))

    base = ExitRules(DecodeExit(window=4, every=1), None, None, 4)
    decode = calibrate_exit(
        recordings, candidates=decode_candidates(base), target=0.5, answer=answer
    )
    assert decode.tried[0].errors == 0  # the simulated answer never changes
    assert decode.rules.decode.confidence == 0.72 and decode.tried[-1].saved > 0.3


def test_waves_save_the_branches_that_never_start():
    recordings = simulated(100, seed=3)
    full = replay(recordings, NOTHING)
    stages = replay(recordings, ExitRules(group=4), stage=2)
    assert [stage.answer for stage in stages] == [vote.answer for vote in full]
    for vote, stage in zip(full, stages, strict=True):
        assert stage.branches == vote.branches[: len(stage.branches)]
        assert len(stage.branches) % 2 == 0
    assert sum(len(stage.branches) for stage in stages) < 90 * BRANCHES
    assert measure_exit(recordings, ExitRules(group=4), stage=2).errors == 0
    together = measure_exit(recordings, ExitRules(group=4)).saved
    assert measure_exit(recordings, ExitRules(group=4), stage=2).saved > together
    assert replay(recordings, NOTHING, stage=3) == full


def test_waves_ask_only_for_open_problems():
    asked = []

    def run(problems, count):
        asked.append((problems, count))
        answers = {0: "a", 1: "a" if len(asked) % 2 else "b"}
        return [[Branch(answers[p], Reason.END, 1)] * count for p in problems]

    first, second = staged_vote(run, 2, branches=5, stage=2)
    assert asked == [([0, 1], 2), ([0, 1], 2), ([1], 1)]
    assert first.weights == {"a": 4.0} and second.weights == {"a": 3.0, "b": 2.0}
    asked.clear()
    staged_vote(run, 2, branches=5, stage=2, consensus=ConsensusExit(0.5))
    assert [count for _, count in asked] == [2]
    with pytest.raises(ValueError, match=r"expected 2 branches of each of 1 problems, got \[1\]"):
        staged_vote(lambda *_: [[Branch("a", Reason.END, 1)]], 1, branches=5, stage=2)


def test_consensus_inside_a_wave_is_refused():
    """Three of the first four agree, which settles that stage and not the vote of sixteen."""
    stopped = [Branch("a", Reason.END, 1)] * 3 + [Branch(None, Reason.CONSENSUS, 1)]
    with pytest.raises(ValueError, match=r"rules=ExitRules\(consensus=None\)"):
        staged_vote(lambda *_: [stopped], 1, branches=16, stage=4)
    (all_at_once,) = staged_vote(lambda *_: [stopped], 1, branches=4, stage=4)
    assert all_at_once.answer == "a"


def test_a_file_holds_all_of_it(tmp_path):
    recordings = simulated(100, seed=4)
    rules = weak_candidates(recordings, ExitRules(group=4), shares=(0.0, 0.05))
    found = calibrate_exit(recordings, candidates=rules, target=0.3, stage=4)
    path = tmp_path / "exit.json"
    found.save(path)
    assert ExitCalibration.load(path) == found
    assert found.stage == 4 and str(found.tried[0]).startswith("0 of 100 votes changed")


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("format_version"),
        lambda values: values.update(format_version=2),
        lambda values: values.pop("target"),
        lambda values: values.update(rules=[]),
        lambda values: values["rules"].update(consensus={"confidence": 3}),
        lambda values: values["rules"].update(consensus={"level": 0.5}),
        lambda values: values["rules"].pop("group"),
        lambda values: values.update(tried=3),
        lambda values: values["tried"][0].update(more=1),
    ],
)
def test_another_file_is_refused(tmp_path, change):
    path = tmp_path / "exit.json"
    calibrate_exit(simulated(100, seed=4), target=0.3).save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"expected a file of ExitCalibration\.save"):
        ExitCalibration.load(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"expected a file of ExitCalibration\.save"):
        ExitCalibration.load(path)


def test_what_cannot_be_calibrated_says_why():
    few = simulated(20, seed=5)
    with pytest.raises(ValueError, match=r"0 of 20 votes changed \(0.00%, at most 13.91%\)"):
        calibrate_exit(few, target=0.05)
    with pytest.raises(ValueError, match="target: expected"):
        calibrate_exit(few, target=5)
    with pytest.raises(ValueError, match="expected at least one"):
        replay([], NOTHING)
    with pytest.raises(ValueError, match="same number of branches"):
        replay([few[0], few[1].part(slice(3))], NOTHING)
    with pytest.raises(ValueError, match="answer: expected a function"):
        replay(few, dataclasses.replace(NOTHING, decode=DecodeExit()))
