"""Whole calibrations of the shipped tiny Llama: repeated and killed."""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, make_problems
from hf_reasoncache import BudgetProfile, ReasonAllocCache
from hf_reasoncache.budgets import BudgetRule
from hf_reasoncache.calibration import run as run_module
from hf_reasoncache.calibration.coverage import Coverage
from hf_reasoncache.calibration.estimate import Estimator
from hf_reasoncache.calibration.prompts import read_prompts
from hf_reasoncache.calibration.queries import query_statistics
from hf_reasoncache.calibration.run import calibrate
from hf_reasoncache.calibration.sensitivity import Eviction, Sensitivity
from hf_reasoncache.calibration.settings import CalibrationSettings
from hf_reasoncache.calibration.together import Check, Comparison
from hf_reasoncache.calibration.traces import TraceSettings
from hf_reasoncache.calibration.tune import Tune
from hf_reasoncache.outputs import sole_writer
from hf_reasoncache.scorers import RKV
from tests.support import launched_commands
from tests.support.copies import Copy

PROMPTS = 6
TRACES = TraceSettings(max_new_tokens=40, batch_size=2, temperature=0.7, seed=11)
EVICTION = Eviction(scorer=RKV(queries=8), buffer=8, window=8)
COVERAGE = CalibrationSettings(Coverage(interval=16), TRACES)
TUNED = CalibrationSettings(
    Sensitivity(budgets=(16, 64), budget=32, eviction=EVICTION),
    TRACES,
    tune=Tune(budget=32, eviction=EVICTION, exponents=(0.5, 1.0), lows=(0.25,), highs=(2.0, 3.0)),
    check=Check(budget=32, eviction=EVICTION),
)
OPTIONS = {
    "--estimator": "coverage",
    "--dtype": "float32",
    "--threads": "1",
    "--max-new-tokens": "40",
    "--batch-size": "2",
    "--temperature": "0.7",
    "--seed": "11",
    "--interval": "16",
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "walk.jsonl"
    problems = make_problems("walk", PROMPTS, DEVELOPMENT_SEEDS[400], "llama")
    path.write_text("".join(json.dumps({"prompt": p.prompt}) + "\n" for p in problems))
    return path


def run(prompts: Path, out: Path, settings: CalibrationSettings, **changes: object):
    model = AutoModelForCausalLM.from_pretrained(
        MODELS["llama"], dtype=torch.float32, attn_implementation="reasoncache"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS["llama"])
    return calibrate(model, tokenizer, read_prompts(str(prompts)), out, settings, **changes)


@pytest.fixture(scope="module")
def reference(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The profile of an undisturbed run in this process, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("reference") / "profile"
    run(prompts, out, COVERAGE)
    torch.set_num_threads(threads)
    return content(out)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def command(prompts: Path, out: Path) -> list[str]:
    options = OPTIONS | {"--prompts": str(prompts), "--out": str(out)}
    return ["calibrate", str(MODELS["llama"]), *flat(options)]


def flat(options: dict[str, str]) -> list[str]:
    return [word for option in options.items() for word in option]


@pytest.fixture(scope="module")
def tuned(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Where the tuned profile of an undisturbed run is, and what the run said."""
    out, said = tmp_path_factory.mktemp("tuned") / "wave", list[str]()
    made = run(prompts, out, TUNED, say=said.append)
    assert made == BudgetProfile.from_pretrained(out)
    return out, said


def test_the_profile_says_what_was_done_and_works(tuned: tuple[Path, list[str]]) -> None:
    out, said = tuned
    loaded = BudgetProfile.from_pretrained(out)
    assert [path.name for path in out.parent.iterdir()] == ["wave"]
    assert (loaded.base_model, loaded.estimator) == ("llama", "sensitivity")
    # 4 of the 6 prompts are held out.
    assert loaded.statistics["divergence"].shape == (2, 4, 2)
    assert len(loaded.calibration.prompts) == 2
    tune = loaded.calibration.settings["tune"]
    assert len({*tune["prompts"], *loaded.calibration.prompts}) == PROMPTS
    assert loaded.calibration.settings["traces"]["max_new_tokens"] == 40
    assert loaded.calibration.settings["estimator"]["eviction"]["scorer"].startswith("RKV(")
    assert loaded.calibration.settings["dtype"] == "torch.float32"
    best = tune["outcome"]["best"]
    rule = best if tune["outcome"]["adopted"] else vars(BudgetRule(1.0, 0.1, 4.0))
    assert vars(loaded.rule) == rule
    answers, bound, check_bound, measured, left, tuning = said[:6]
    assert answers == "answers: at most 6 x 40 tokens to write"
    assert re.fullmatch(
        r"sensitivity: at most [\d,]+ tokens to read, then tuning on 4 of the texts", bound
    )
    assert re.fullmatch(r"sensitivity: [\d,]+ tokens to read", measured)
    assert re.fullmatch(r"sensitivity: about [\d.]+ minutes left", left)
    assert re.fullmatch(r"tune: [\d,]+ tokens to read", tuning)
    assert re.fullmatch(r"check: at most [\d,]+ tokens to read", check_bound)
    outcome = loaded.calibration.settings["check"]["outcome"]
    assert said[-1] == f"check: on these texts, at 32 tokens {told(outcome)}"
    counts = [
        int(re.findall(r"([\d,]+) tokens to read", line)[0].replace(",", ""))
        for line in (measured, bound)
    ]
    assert 0 < counts[0] <= counts[1]
    assert sum(loaded.layer_budgets(64)) == 4 * 64
    model = AutoModelForCausalLM.from_pretrained(MODELS["llama"])
    loaded.check(model)
    assert ReasonAllocCache(model.config, budget=64, profile=out).layers


def told(outcome: dict) -> Comparison:
    return Comparison(**{name: x for name, x in outcome.items() if name != "verdict"})


CALLS = {"generate_traces": 3, "Sensitivity.measure": 2, "Tune.measure": 4, "Check.measure": 2}


@pytest.mark.parametrize("method", CALLS)
def test_an_interrupted_run_goes_on_where_it_was(
    prompts: Path, tmp_path: Path, tuned: tuple[Path, list[str]], method: str
) -> None:
    out, calls = tmp_path / "wave", 0
    target, _, name = method.rpartition(".")
    owner = {"": run_module, "Sensitivity": Sensitivity, "Tune": Tune, "Check": Check}[target]
    whole = getattr(owner, name)

    def once(*arguments: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, once)
        with pytest.raises(KeyboardInterrupt):
            run(prompts, out, TUNED)
        assert not out.exists()
        run(prompts, out, TUNED)
    # What was finished is not done again: the call that failed, and those after it.
    assert calls == CALLS[method] + 1
    assert content(out) == content(tuned[0])


def test_answers_outlive_settings_of_the_estimator_that_do_not_fit(
    prompts: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # As if the answers could have been longer.
        patch.setattr(Coverage, "expect", lambda *_: None)
        with pytest.raises(ValueError, match="more than 64 tokens, got 0 of 6"):
            run(prompts, tmp_path / "wave", CalibrationSettings(Coverage(interval=64), TRACES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "generate_traces", None)
        run(prompts, tmp_path / "wave", COVERAGE)
    assert BudgetProfile.from_pretrained(tmp_path / "wave").estimator == "coverage"


PROTECTED = replace(EVICTION, protect_prompt=True)


@pytest.mark.parametrize(
    ("estimator", "judge", "match"),
    [
        (Coverage(interval=40), None, "more than 40 tokens, got 0 of 6"),
        (Sensitivity((400,), eviction=EVICTION), None, "expected texts longer than 408 tokens"),
        (Sensitivity((16,), eviction=PROTECTED), None, r"budgets: expected at least \d+ tokens"),
        (Coverage(interval=16), Tune(16, PROTECTED), r"budget: expected at least \d+ tokens"),
        (Coverage(interval=16), Check(16, PROTECTED), r"budget: expected at least \d+ tokens"),
    ],
)
def test_what_no_answer_can_mend_is_said_before_any(
    prompts: Path, tmp_path: Path, estimator: Estimator, judge: Tune | Check | None, match: str
) -> None:
    name = "check" if isinstance(judge, Check) else "tune"
    settings = CalibrationSettings(estimator, TRACES, **{name: judge})
    with pytest.raises(ValueError, match=match):
        run(prompts, tmp_path / "wave", settings)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said_before_any_answer(
    prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: expected a directory or a new name, got a file"):
        run(prompts, tmp_path / "file", COVERAGE)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="expected no file or a profile's"):
        run(prompts, tmp_path, COVERAGE)
    with sole_writer(tmp_path / "wave"):
        refused: list[str] = []

        def second() -> None:
            try:
                run(prompts, tmp_path / "wave", COVERAGE)
            except ValueError as error:
                refused.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "expected no other run that writes it" in refused[0]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["config.json", "file"]


def test_another_seed_gives_another_profile_and_no_mixture(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    other = CalibrationSettings(COVERAGE.estimator, TraceSettings(40, 2, 0.7, seed=12))
    foreign = tmp_path / "wave.partial" / "notes.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    with pytest.raises(ValueError, match="got another directory"):
        run(prompts, tmp_path / "wave", other, resume=False)
    foreign.unlink()
    run(prompts, tmp_path / "wave", other)
    assert content(tmp_path / "wave") != reference


@pytest.mark.slow
def test_a_killed_command_goes_on_and_gives_the_same_profile(
    prompts: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    out = tmp_path / "wave"
    process = Copy(launched_commands.run, command(prompts, out))
    deadline = time.monotonic() + 120
    # Some of the prompts are measured, others are not.
    while len(list(tmp_path.glob("wave.partial/coverage-*.safetensors"))) < 2:
        assert time.monotonic() < deadline and process.returncode is None, process.stderr
        time.sleep(0.002)
    process.kill()
    left = len(list(tmp_path.glob("wave.partial/coverage-*.safetensors")))
    assert 2 <= left < PROMPTS and not out.exists()
    process = Copy(launched_commands.run, command(prompts, out))
    assert process.wait(120) == 0, process.stderr
    assert process.stdout == f"{out}\n"
    assert re.fullmatch(
        r"answers: at most 6 x 40 tokens to write\n"
        r"coverage: at most [\d,]+ tokens to read\n"
        r"check: at most [\d,]+ tokens to read\n"
        r"(answers: \d of 6 prompts, .+ left\n)+"
        r"coverage: [\d,]+ tokens to read\n"
        r"(coverage: \d of 6 prompts, .+ left\n)+"
        r"(coverage: about [\d.]+ minutes left\n)?"
        r"(coverage: \d of 6 prompts, .+ left\n)+"
        r"check: left out, no text is long enough for an eviction\n",
        process.stderr,
    )
    assert content(out) == reference


def test_statistics_of_queries_are_kept_where_they_are_wanted(
    prompts: Path, tmp_path: Path
) -> None:
    profile = run(prompts, tmp_path / "wave", replace(COVERAGE, queries=True))
    found = BudgetProfile.from_pretrained(tmp_path / "wave").statistics
    layers, heads, half = 4, 8, profile.geometry.head_size // 2
    assert found["query_norm"].shape == (PROMPTS, layers, heads, half)
    assert "tokens.mean" in found
    model = AutoModelForCausalLM.from_pretrained(MODELS["llama"])
    known = query_statistics(found, model.config)
    assert known.layers == profile.geometry.full_attention_layers
    plain = run(prompts, tmp_path / "plain", COVERAGE)
    assert plain.demand == profile.demand and "query_norm" not in plain.statistics
