"""`evaluate` and `audit` as a user meets them: help, files, errors, exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, make_problems

MODEL = MODELS["llama"]
SMALL = ["--dtype", "float32", "--device", "cpu", "--window", "16", "--buffer", "16"]
SMALL += ["--max-new-tokens", "48", "--batch-size", "20"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "walks.jsonl"
    rows = [
        {"prompt": each.prompt, "check": {"name": "matches", "pattern": "^#"}}
        for each in make_problems("walk", 2, DEVELOPMENT_SEEDS[750], "llama")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """The first case of the shipped suite; its steps are asked, not its end."""
    row = json.loads((MODEL / "audit.jsonl").read_text().split("\n")[0])
    row |= {"alone": False, "max_new_tokens": 48}
    row["instructions"] = [
        each | {"check": {"name": "matches", "pattern": rf"\b{each['name']}\b"}}
        for each in row["instructions"]
    ]
    path = tmp_path / "suite.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("command", ["evaluate", "audit"])
def test_help_fits_80_columns(run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80


def test_evaluate_compares_and_goes_on(run, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    command = ["evaluate", MODEL, "--task", questions, "--cache", "snapkv:prompt=evict", *SMALL]
    command += ["--budgets", "48,400", "--out", out]
    status, printed, said = run(*command)
    assert status == 0
    assert max(len(line) for line in printed.splitlines() if str(out) not in line) <= 80
    assert "no 'random, prompt kept' at 48" in said
    assert "WARNING: snapkv:prompt=evict at 400 evicted nothing" in said
    answers = (out / "answers.jsonl").read_bytes()
    assert answers.count(b"\n") == 1 + 2 * 4
    results = json.loads((out / "results.json").read_text())
    assert [(row["cache"], row["budget"]) for row in results] == [
        ("full", None),
        ("random, prompt kept", 400),
        ("snapkv:prompt=evict", 48),
        ("snapkv:prompt=evict", 400),
    ]
    assert all(row["correct"] == {"count": 2, "total": 2} for row in results)
    assert results[2]["p_full"] == 1.0
    assert (out / "results.md").read_text().count("\n") == 2 + 4
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert run(*command)[:2] == (0, printed)
    assert (out / "answers.jsonl").read_bytes() == answers


def test_a_second_command_adds_to_the_tables_and_fewer_questions_are_not_asked_again(
    run, questions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    command = ["evaluate", MODEL, "--task", questions, *SMALL, "--no-baseline", "--out", out]
    first = ["--cache", "rkv:prompt=evict", "--budgets", "48"]
    second = ["--cache", "random:prompt=evict", "--budgets", "48"]
    # One question of two: no line of a table that has both.
    assert run(*command, "--limit", "1", "--cache", "h2o:prompt=evict", "--budgets", "40")[0] == 0
    status, _, said = run(*command, *first)
    assert status == 0 and "rkv:prompt=evict 48: 4 of 4 answers" in said
    status, printed, _ = run(*command, *second)
    assert status == 0
    results = json.loads((out / "results.json").read_text())
    assert [row["cache"] for row in results] == ["full", "rkv:prompt=evict", "random:prompt=evict"]
    assert results[1]["against_random"]["total"] == 2, "the random eviction of the other command"
    assert "rkv:prompt=evict" in printed
    answers = (out / "answers.jsonl").read_bytes()
    status, _, said = run(*command, "--limit", "1", *first)
    assert status == 0 and "answers," not in said
    assert (out / "answers.jsonl").read_bytes() == answers
    results = json.loads((out / "results.json").read_text())
    assert {row["cache"] for row in results} == {
        "full",
        "h2o:prompt=evict",
        "rkv:prompt=evict",
        "random:prompt=evict",
    }
    assert all(row["correct"]["total"] == 1 for row in results)


def test_evaluate_certifies_budgets_and_reads_answers_again(
    run, questions: Path, tmp_path: Path
) -> None:
    """Two questions without a loss have a bound of 1/3."""
    out = tmp_path / "found"
    command = ["evaluate", MODEL, "--task", questions, "--cache", "rkv:prompt=evict", *SMALL]
    command += ["--no-baseline", "--budgets", "48,400", "--out", out, "--fidelity", "--certify"]
    status, printed, _ = run(*command, "0.4")
    assert status == 0
    assert max(len(line) for line in printed.splitlines() if str(out) not in line) <= 80
    assert "excess loss over the full cache of at most 0.4" in printed
    (found,) = json.loads((out / "certified.json").read_text())
    assert (found["task"], found["cache"], found["budget"]) == ("walks", "rkv:prompt=evict", 48)
    assert found["bounds"] == {"48": pytest.approx(1 / 3), "400": pytest.approx(1 / 3)}
    results = json.loads((out / "results.json").read_text())
    full, small, large = (row["fidelity"] for row in results)
    assert full["divergence"]["value"] == 0 < small["divergence"]["value"]
    assert large["never"] == 2 and large["divergence"]["value"] < 1e-5
    assert "| KL | until |" in (out / "results.md").read_text()
    status, printed, _ = run(*command, "0.1")
    assert status == 0 and "rkv:prompt=evict: 2 questions; 0.1 needs 9 or more." in printed
    status, _, said = run(*command, "1.5")
    assert status == 1 and "--certify: expected a share in (0, 1), got 1.5" in said


def test_a_task_of_another_module(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_task_of_this_test.py").write_text(
        "from hf_reasoncache.evaluation import Judgement, Question\n"
        "class Own:\n"
        "    name = 'own'\n"
        "    def questions(self, seed):\n"
        "        return [Question(str(seed), '<bos> RULE a+ 1 . start a 1 go #3 <think>')]\n"
        "    def check(self, question, answer):\n"
        "        return Judgement(correct=question.id == '3')\n"
    )
    status, printed, _ = run(
        *("evaluate", MODEL, "--task", "own_task_of_this_test:Own", "--seeds", "3,4"),
        *("--cache", "random", "--budgets", "32", "--out", tmp_path / "out", "--no-baseline"),
        *SMALL,
    )
    assert status == 0
    assert "own, 2 answers each" in printed
    assert "50.0 (" in printed


def test_audit_fails_where_a_limit_is_exceeded(run, suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    command = ["audit", MODEL, "--suite", suite, "--cache", "random:prompt=evict", *SMALL]
    command += ["--budgets", "40", "--out", out]
    status, printed, _ = run(*command)
    assert status == 0
    assert max(len(line) for line in printed.splitlines() if str(out) not in line) <= 80
    assert {path.name for path in out.iterdir()} == {
        *("answers.jsonl", "audit.json", "audit.md", "audit.png")
    }
    # 48 words do not reach the end, where FINAL is due: the full cache does not follow it either.
    status, _, said = run(*command, "--min-following", "0.5")
    assert status == 2
    model, cache = said.splitlines()
    assert model.startswith("LIMIT: full cache: FINAL is followed in 0.0 (")
    assert cache.startswith("LIMIT: random:prompt=evict @ 40: ")
    assert "FINAL" not in cache and "; full cache 100.0 (" in cache
    assert json.loads((out / "audit.json").read_text())["violations"]


def test_protecting_the_instructions_keeps_them(run, suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    status, _, _ = run(
        *("audit", MODEL, "--suite", suite, "--budgets", "56", "--out", out, *SMALL),
        *("--cache", "random:prompt=evict", "--cache", "random:protect"),
    )
    assert status == 0
    _, plain, kept = json.loads((out / "audit.json").read_text())["cells"]
    assert {rate for each in kept["classes"] for rate in each["keep_rates"]} == {1.0}
    assert all(rate < 1 for each in plain["classes"] for rate in each["keep_rates"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--cache": "nonsense"}, "--cache: expected one of full"),
        ({"--budgets": "1.5"}, "--budgets: expected whole numbers"),
        ({"--task": "none.jsonl"}, "none.jsonl"),
        ({"--seeds": "x"}, "--seeds: expected whole numbers"),
        ({"--budgets": "17", "--cache": "random"}, "budget too small"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    run, questions: Path, tmp_path: Path, change: dict, said: str
) -> None:
    options = {"--task": questions, "--cache": "snapkv", "--budgets": "64", "--out": tmp_path / "x"}
    pairs = [part for pair in (options | change).items() for part in pair]
    status, _, error = run("evaluate", MODEL, *pairs, *SMALL)
    assert status == 1
    assert said in error
    assert "Traceback" not in error
