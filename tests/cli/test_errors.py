"""What is wrong with a command is said in one line, before any work; a bug shows where it is."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from examples.tiny_reasoner import MODELS
from hf_reasoncache.cli import evaluate as evaluate_module
from hf_reasoncache.messages import LONGEST
from hf_reasoncache.outputs import sole_writer

MODEL = MODELS["llama"]
NO_MODEL = "no/such/model/anywhere"
"""What is said before it is looked for is said before any work."""

LINES = {
    "task": {"prompt": "a", "answer": "1"},
    "suite": {
        "prompt": "[[instruction]]",
        "instructions": [{"name": "a", "text": "t", "check": "lowercase"}],
    },
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name, line in LINES.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    return {name: tmp_path / f"{name}.jsonl" for name in LINES}


def command(name: str, files: dict[str, Path], out: Path, *more: object) -> list[object]:
    own: dict[str, dict[str, object]] = {
        "evaluate": {"--task": files["task"], "--cache": "snapkv", "--budgets": "64"},
        "audit": {"--suite": files["suite"], "--cache": "snapkv", "--budgets": "64"},
        "calibrate": {"--prompts": files["task"]},
        "generate": {"--prompts": files["task"], "--memory": "1GB"},
    }
    usual = [part for pair in own[name].items() if pair[0] not in more for part in pair]
    return [name, NO_MODEL, *usual, "--out", out, *more]


def refused(run, *arguments: object, status: int = 1) -> str:
    """The one line that a command says."""
    got, out, error = run(*arguments)
    assert (got, out) == (status, "")
    lines = error.strip().splitlines()
    assert all(len(line) <= LONGEST for line in lines)
    assert "Traceback" not in error
    return lines[-1]


WORK = ["evaluate", "audit", "calibrate"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "--budgets", "inf"], "--budgets: expected whole numbers of tokens"),
        (["evaluate", "--budgets", "nan"], "--budgets: expected whole numbers of tokens"),
        (["evaluate", "--budgets", "64,1e400"], "--budgets: expected whole numbers of tokens"),
        (["audit", "--budgets", "-inf"], "--budgets: expected whole numbers of tokens"),
        (["evaluate", "--temperature", "inf"], "temperature: expected 0 (greedy) to 10, got inf"),
        (["evaluate", "--seeds", "9" * 30], "seeds: expected an integer <= 2147483647"),
        (["evaluate", "--seeds", "0,-1"], "seeds: expected an integer >= 0, got -1"),
        (["evaluate", "--seeds", "x" * 9999], "--seeds: expected whole numbers"),
        (["evaluate", "--max-new-tokens", "9" * 30], "max_new_tokens: expected an integer <="),
        (["evaluate", "--cache", "full"], "--cache: expected a compressed cache"),
        (["audit", "--cache", "full"], "--cache: expected a compressed cache"),
        (["evaluate", "--cache", "x" * 9999], "--cache: expected one of full"),
        (["evaluate", "--cache", "snapkv:" + "x" * 9999], "is not known; see --help"),
        (["evaluate", "--task", "json:loads"], "TypeError: loads() missing 1 required"),
        (["evaluate", "--task", "x" * 9999], "expected FILE.jsonl or module:name"),
        (["calibrate", "--seed", "9" * 30], "seed: expected an integer <= 2147483647"),
        (["calibrate", "--tune", "--budget", "9" * 30], "budget: expected an integer <="),
        (["calibrate", "--push-to", "nonsense"], "expected a repository ORG/NAME"),
        *((["evaluate", "--device", name], "--device: expected a device of this machine")
          for name in ("cuda:99", "nonsense", "meta", "x" * 9999)),
        (["generate", "--memory", "x" * 9999], "--memory: expected an amount"),
        (["generate", "--cache", "x" * 9999], "--cache: expected one of full"),
        (["generate", "--cache", "snapkv", "--budget", "inf"], "--budget: expected whole numbers"),
        (["generate", "--cache", "snapkv"], "--budget: expected one for snapkv, got None"),
        (["generate", "--device", "cuda:99"], "--device: expected a device of this machine"),
        (["audit", "--device", "cuda:99"], "--device: expected a device of this machine"),
        (["calibrate", "--device", "cuda:99"], "--device: expected a device of this machine"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_an_argument_that_cannot_be_right(
    run, files: dict[str, Path], tmp_path: Path, arguments: list[str], said: str
) -> None:
    name, *more = arguments
    line = refused(run, *command(name, files, tmp_path / "out", *more))
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "inf"], "--budget: expected whole numbers of tokens"),
        (["--batch", "inf"], "--batch: expected whole numbers of tokens"),
        (["--batch", "nan"], "--batch: expected whole numbers of tokens"),
        (["--bandwidth", "inf"], "bandwidth: expected a finite number > 0, got inf"),
        (["--flops", "1e400"], "flops: expected a finite number > 0, got inf"),
        (["--memory", "9" * 400 + "GB"], "--memory: expected an amount"),
        (["--memory", "2000000GB"], "--memory: expected an amount"),
        (["--weights", "9" * 400], "--weights: expected an amount"),
        (["--gpu", "x" * 9999], "gpu: expected one of A100"),
        (["--cache", "sliding-window:recent=x"], "is not known"),
    ],
)
def test_a_plan_that_cannot_be_right(run, options: list[str], said: str) -> None:
    usual = {"--context": "4096", "--budget": "64"}
    pairs = [part for pair in usual.items() if pair[0] not in options for part in pair]
    assert said in refused(run, "plan", MODEL, *pairs, *options)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("evaluate", "--temperature"),
        ("audit", "--min-following"),
        ("audit", "--max-drop"),
        ("audit", "--max-leakage"),
        ("calibrate", "--temperature"),
        ("plan", "--bandwidth"),
        ("plan", "--reserve"),
    ],
)
def test_what_is_not_a_number(run, files, tmp_path: Path, name: str, option: str) -> None:
    """Some releases of typer compare it with the bounds of an option, and let it through."""
    arguments: list[object] = ["plan", MODEL, "--context", "4096", "--budget", "64", option, "nan"]
    if name != "plan":
        arguments = command(name, files, tmp_path / "out", option, "nan")
    status, out, error = run(*arguments)
    assert (status, out) in ((1, ""), (2, ""))
    assert "Traceback" not in error
    assert option.strip("-").replace("-", "_") in error.replace("-", "_").splitlines()[-1]


def test_a_plan_of_all_memory_is_computed(run) -> None:
    """A petabyte holds more rows than a list could."""
    options = ("--memory", "1000TB", "--context", 300, "--prompt", 32)
    options += ("--budget", 64, "--batch", "1,1e9")
    status, out, said = run("plan", MODEL, *options)
    assert status == 0 and "1000000000 rows" in out, said


@pytest.mark.parametrize("option", ["--batch-size", "--context", "--no-such-option"])
def test_wrong_usage_is_short_too(run, option: str) -> None:
    status, out, error = run("plan", MODEL, f"{option}={'x' * 100_000}")
    assert (status, out) == (2, "")
    assert all(len(line) <= LONGEST for line in error.splitlines())
    assert error.startswith("Usage: ")


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": "a \\ud800 b", "answer": "1"}'])
def test_a_line_that_nothing_can_read(
    run, files: dict[str, Path], tmp_path: Path, name: str, line: str
) -> None:
    for path in files.values():
        path.write_text(line + "\n")
    said = refused(run, *command(name, files, tmp_path / "out"))
    assert ".jsonl:1: expected" in said
    assert not (tmp_path / "out").exists()


def test_a_data_set_without_its_package(run, files, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    arguments = command("calibrate", files, tmp_path / "out", "--prompts", "org/dataset")
    assert "pip install 'hf-reasoncache[calibrate]'" in refused(run, *arguments)


@pytest.mark.parametrize("name", ["evaluate", "audit"])
@pytest.mark.parametrize(("package", "extra"), [("scipy", "eval"), ("matplotlib", "plot")])
def test_a_package_that_the_results_need(
    run, files, tmp_path: Path, monkeypatch, name: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(run, *command(name, files, tmp_path / "out"))
    assert f"expected the package {package}" in said and f"hf-reasoncache[{extra}]" in said


@pytest.mark.parametrize("name", WORK)
def test_an_output_that_is_a_file(run, files, tmp_path: Path, name: str) -> None:
    (tmp_path / "f8").touch()
    said = refused(run, *command(name, files, tmp_path / "f8"))
    assert "f8: expected a directory or a new name, got a file" in said


@contextmanager
def another_run(output: Path) -> Iterator[None]:
    """Somebody else writes an output; to the lock a thread is as good as a process."""
    begun, ended = threading.Event(), threading.Event()

    def hold() -> None:
        with sole_writer(output):
            begun.set()
            ended.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait(60)
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("name", WORK)
def test_a_second_run_into_one_output(run, files, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with another_run(out if name == "calibrate" else out / "answers.jsonl"):
        said = refused(run, *command(name, files, out))
        assert "expected no other run that writes it, got one; wait until" in said
    assert NO_MODEL in refused(run, *command(name, files, out)), "then it is free"
    assert list(out.iterdir()) == []


def test_a_bug_shows_where_it_is(run, files, tmp_path: Path, monkeypatch) -> None:
    for bug in (KeyError, TypeError, RuntimeError, AttributeError):

        def broken(*_: object, kind: type[Exception] = bug, **__: object) -> None:
            raise kind("a bug")

        monkeypatch.setattr(evaluate_module, "load_task", broken)
        with pytest.raises(bug, match="a bug"):
            run(*command("evaluate", files, tmp_path / "out"))


def test_an_interruption_is_no_traceback(run, files, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "load_task", interrupted)
    status, _, error = run(*command("evaluate", files, tmp_path / "out"))
    assert status in (1, 130) and "Traceback" not in error


@pytest.mark.parametrize(
    "config",
    [
        "[" * 100_000,
        '{"model_type": []}',
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "llama", "dtype": "int99"}',
    ],
)
@pytest.mark.parametrize("name", ["plan", "evaluate"])
def test_a_config_that_is_not_valid(run, files, tmp_path: Path, config: str, name: str) -> None:
    (tmp_path / "config.json").write_text(config)
    arguments: list[object] = ["plan", tmp_path, "--context", "4096", "--budget", "64"]
    if name != "plan":
        arguments = command(name, files, tmp_path / "out")
        arguments[1] = tmp_path
    assert "expected the config of a model, got" in refused(run, *arguments)


def test_damaged_weights_are_named(run, files, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in MODEL.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    weights = next(copy.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    arguments = command("evaluate", files, tmp_path / "out")
    arguments[1] = copy
    assert "expected the weights of a model, got a damaged file" in refused(run, *arguments)
