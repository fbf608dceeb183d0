"""`calibrate` as a user meets it: help, errors, exit status, and where output goes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, make_problems
from hf_reasoncache import BudgetProfile

MODEL = MODELS["llama"]
SHORT = ["--max-new-tokens", "24", "--temperature", "0", "--dtype", "float32"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    problems = make_problems("walk", 2, DEVELOPMENT_SEEDS[400], "llama")
    path.write_text("".join(json.dumps({"prompt": p.prompt}) + "\n" for p in problems))
    return path


def test_help_fits_80_columns_and_names_the_launcher(run) -> None:
    status, out, _ = run("calibrate", "--help")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "accelerate launch -m hf_reasoncache.cli calibrate ..." in " ".join(out.split())


def test_settings_reach_the_profile(run, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "wave"
    options = ["--budgets", "12,40", "--budget", "24", "--heads"]
    options += ["--window", "6", "--buffer", "9", "--scorer", "snapkv", "--rows", "3"]
    options += ["--every", "2"]
    status, printed, said = run(
        "calibrate", MODEL, "--prompts", prompts, "--out", out, *SHORT, *options
    )
    assert (status, printed) == (0, f"{out}\n")
    assert re.fullmatch(
        r"answers: at most 2 x 24 tokens to write\n"
        r"sensitivity: at most [\d,]+ tokens to read\n"
        r"check: at most [\d,]+ tokens to read\n"
        r"answers: 2 of 2 prompts, .+ left\n"
        r"sensitivity: [\d,]+ tokens to read\n"
        r"sensitivity: about [\d.]+ minutes left\n"
        r"sensitivity: 1 of 2 prompts, .+ left\n"
        r"sensitivity: 2 of 2 prompts, .+ left\n"
        r"check: [\d,]+ tokens to read\n"
        r"check: about [\d.]+ minutes left\n"
        r"check: 1 of 2 prompts, .+ left\n"
        r"check: 2 of 2 prompts, .+ left\n"
        r"check: on these texts, at 24 tokens against equal layers: .+\n",
        said,
    )
    profile = BudgetProfile.from_pretrained(out)
    assert profile.estimator == "sensitivity" and profile.head_demand is not None
    settings = profile.calibration.settings
    assert settings["estimator"]["budgets"] == [12, 40]
    assert (settings["estimator"]["rows"], settings["estimator"]["every"]) == (3, 2)
    assert settings["estimator"]["eviction"] == {
        "scorer": "SnapKV(queries=6, kernel=5)",
        "buffer": 9,
        "window": 6,
        "protect_prompt": False,
        "head_budgets": False,
    }
    assert settings["traces"]["temperature"] == 0.0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--budgets", "12,x"], 2, "expected integers with commas between them, got '12,x'"),
        (["--interval", "0"], 2, "Invalid value for '--interval'"),
        (["--interval", "4"], 1, "error: coverage: expected 1 <= queries <= interval"),
        (["--interval", "64"], 1, "error: coverage: expected at least 2 completions of more"),
        (["--tune"], 1, "error: tune: expected at least 6 prompts"),
        (["--chat"], 1, "prompts.jsonl:1: expected a tokenizer with a chat template"),
    ],
)
def test_an_error_is_one_line(
    run, prompts: Path, tmp_path: Path, options: list[str], status: int, message: str
) -> None:
    if options[0] == "--interval":
        options = ["--estimator", "coverage", *options]
    arguments = [MODEL, "--prompts", prompts, "--out", tmp_path / "wave", *SHORT, *options]
    got, out, error = run("calibrate", *arguments)
    assert (got, out) == (status, "")
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "wave").exists()


@pytest.mark.parametrize("missing", ["prompts", "model"])
def test_what_is_missing_is_named(run, prompts: Path, tmp_path: Path, missing: str) -> None:
    model = tmp_path / "no-model" if missing == "model" else MODEL
    source = tmp_path / "no.jsonl" if missing == "prompts" else prompts
    status, out, error = run(
        "calibrate", model, "--prompts", source, "--out", tmp_path / "wave", *SHORT
    )
    assert (status, out) == (1, "")
    assert f"no{'-model' if missing == 'model' else '.jsonl'}" in error
    assert "Traceback" not in error
