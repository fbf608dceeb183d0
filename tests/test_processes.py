"""Two processes give what one gives; one that dies ends the other, and what was finished stays."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, make_problems
from hf_reasoncache import cli
from hf_reasoncache.processes import Processes
from tests.support import launched_commands
from tests.support.copies import Copy

MODEL = str(MODELS["llama"])
COMMON = "--dtype float32 --device cpu --threads 1 --batch-size 2 --max-new-tokens 24"
COMMANDS = ("evaluate", "audit", "calibrate", "generate")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    check = {"name": "matches", "pattern": "ODD"}
    rows = [
        {"prompt": each.prompt, "check": check}
        for each in make_problems("walk", 7, DEVELOPMENT_SEEDS[850], "llama")
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = json.loads((MODELS["llama"] / "audit.jsonl").read_text("utf-8").split("\n")[0])
    (folder / "suite.jsonl").write_text(json.dumps(suite | {"max_new_tokens": 24}) + "\n")
    return folder


def command(name: str, inputs: Path, out: Path) -> list[str]:
    prompts, suite = inputs / "prompts.jsonl", inputs / "suite.jsonl"
    small = "--window 16 --buffer 16"
    own = {
        "evaluate": f"--task {prompts} --cache snapkv:prompt=evict --budgets 48 {small} "
        "--temperature 0.7",
        "audit": f"--suite {suite} --cache random:prompt=evict --budgets 48 {small}",
        "calibrate": f"--prompts {prompts} --estimator coverage --interval 8 --temperature 0.7",
        "generate": f"--prompts {prompts} --cache snapkv:prompt=evict --budget 48 {small} "
        "--memory 1GB --samples 3 --temperature 0.7",
    }
    target = out / name / ("answers.jsonl" if name == "generate" else "")
    return [name, MODEL, *own[name].split(), *COMMON.split(), "--out", str(target)]


def here(name: str, inputs: Path, out: Path) -> None:
    """Run a command in this process."""
    call = command(name, inputs, out)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hf-reasoncache", *call])
        patch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    torch.set_num_threads(threads)
    assert not ended.value.code


def launch(
    names: tuple[str, ...], inputs: Path, out: Path, death: str = ""
) -> tuple[int, str, str]:
    """Run commands in two processes: exit status, stdout and stderr."""
    calls = [command(name, inputs, out) for name in names]
    launched = Copy(launched_commands.launch, *calls, environment={"DEATH": death, "COLUMNS": "80"})
    return launched.wait(200), launched.stdout, launched.stderr


def contents(out: Path, name: str) -> dict[str, object]:
    """What a command has written; without seconds, and what else is about the run."""
    found: dict[str, object] = {}
    for path in sorted((out / name).iterdir()):
        if path.name.endswith(".meta.json"):
            found[path.name] = json.loads(path.read_text("utf-8"))["settings"]
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            found[path.name] = [row | {"seconds": 0} if "seconds" in row else row for row in rows]
        else:
            found[path.name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference")
    for name in COMMANDS:
        here(name, inputs, out)
    return out


@pytest.mark.slow
def test_two_processes_write_what_one_does(inputs: Path, reference: Path, tmp_path: Path) -> None:
    status, printed, said = launch(COMMANDS, inputs, tmp_path)
    assert status == 0, said
    for name in COMMANDS:
        assert contents(tmp_path, name) == contents(reference, name)
        assert printed.count(str(tmp_path / name)) == 1
    meta = json.loads((tmp_path / "generate" / "answers.jsonl.meta.json").read_text())
    assert meta["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "calibrate", "generate"])
def test_a_killed_process_ends_the_other_and_another_number_goes_on(
    inputs: Path, reference: Path, tmp_path: Path, name: str
) -> None:
    begin = time.monotonic()
    status, _, said = launch((name,), inputs, tmp_path, "kill:1")
    assert status != 0
    assert "SIGKILL" in said
    assert time.monotonic() - begin < 120
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert any("part" in each or "trace-" in each for each in left), "what was finished"
    here(name, inputs, tmp_path)
    mine, theirs = contents(tmp_path, name), contents(reference, name)
    if name == "evaluate":
        # Those that were finished before come first.
        for found in (mine, theirs):
            found["answers.jsonl"] = sorted(found["answers.jsonl"], key=json.dumps)
    assert mine == theirs


@pytest.mark.slow
def test_a_process_that_fails_says_why_and_ends_the_other(inputs: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    status, printed, said = launch(("evaluate",), inputs, tmp_path, "fail:1")
    assert status != 0
    assert printed == ""
    assert said.count("error: expected a long life, got this") == 1
    assert time.monotonic() - begin < 120
    # Process 0 was either ended in the middle, or had come to where it waits for the other.
    rest = [line for line in said.splitlines() if line.startswith("error: ") and "life" not in line]
    assert all("expected all 2 processes to come this far" in line for line in rest)


def test_a_launch_that_starts_one_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.warns(UserWarning, match="expected several processes, got one"):
        assert Processes(cpu=True).count == 1


def test_shards_of_a_model_do_not_share_prompts() -> None:
    sharded = SimpleNamespace(tp_size=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="a whole model in each process, got one of 2 shards"):
        Processes.of(sharded)


def test_where_there_is_no_terminal_a_bar_is_a_line_for_each_piece_of_work(capsys) -> None:
    processes = Processes(cpu=True)
    with processes.bar(4, "answer", progress=True) as bar:
        bar.set_description("rkv 64")
        bar.update(3)
        bar.set_postfix_str("5 tokens/s")
        bar.update(0)
        bar.update(1)
    lines = [line.split(", ") for line in capsys.readouterr().err.splitlines()]
    assert [line[0] for line in lines] == ["rkv 64: 3 of 4 answers", "rkv 64: 4 of 4 answers"]
    assert lines[1][-1] == "5 tokens/s"
    for progress in (None, False):
        with processes.bar(4, "answer", progress=progress) as bar:
            bar.update(4)
    assert capsys.readouterr().err == ""
