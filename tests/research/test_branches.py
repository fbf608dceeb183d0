"""The examples of branches run as their page says, on few problems."""

import csv
import random
import sys

import pytest
import torch

from examples.research import rksc, self_consistency, similar_steps
from examples.research.branch_recordings import Sampling, mixed, record_branches
from examples.tiny_reasoner import MODELS, check, make_problems
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache.branching import ExitCalibration


def markers(path, *names):
    path.write_text("".join(f"<!-- {name} -->\n<!-- end {name} -->\n" for name in names))
    return path


def call(module, monkeypatch, tmp_path, document, *arguments):
    common = ["--document", str(document), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [module.__name__, *common, *arguments])
    module.main()


def test_self_consistency(tmp_path, monkeypatch, capsys):
    names = ("self_consistency-llama", "self_consistency-llama-time")
    document = markers(tmp_path / "page.md", *names)
    few = ["--problems", "2", "--held-out", "2", "--branches", "4", "--target", "0.9"]
    few += ["--timed", "2", "--recordings", str(tmp_path / "recordings")]
    call(self_consistency, monkeypatch, tmp_path, document, *few)
    page = document.read_text()
    assert "Calibrated:" in page and "| certain consensus | " in page
    with (tmp_path / "self_consistency-llama.csv").open() as file:
        rows = {row["vote"]: row for row in csv.DictReader(file)}
    assert rows["certain consensus"]["votes changed"].startswith("0.0 ")
    assert rows["certain consensus"]["target"] == "0"
    assert rows["calibrated consensus, stages of 4"]["target"] == "90"
    assert ExitCalibration.load(tmp_path / "exit-llama-consensus-stages.json").stage == 4
    assert (tmp_path / "self_consistency-llama.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "self_consistency-llama-time.csv").open() as file:
        timed = list(csv.DictReader(file))
    assert timed[0]["over prompt per branch: mean, peak"] == "1.00x, 1.00x"
    assert timed[1]["tokens"] == timed[0]["tokens"]  # the same branches, their prompt shared
    assert "Traceback" not in capsys.readouterr().out


def test_recordings_are_read_back_as_they_were(tmp_path, monkeypatch):
    model, tokenizer = load(MODELS["llama"])
    sampling = Sampling("llama", 1.0, 3)
    problems = {"chain": make_problems("chain", 2, 1999, "llama")}
    arguments = (model, tokenizer, problems, sampling, tmp_path, 1999)
    first = record_branches(*arguments)
    monkeypatch.setattr(model, "generate", None)  # drawn once only
    second = record_branches(*arguments)
    assert len(first) == 2 and sampling.folder(tmp_path, 5).name == "llama-1-3x10-5"
    for a, b in zip(first, second, strict=True):
        assert a.answers == b.answers and a.ended == b.ended
        assert all(map(torch.equal, a.ids, b.ids))
        assert all(map(torch.equal, a.confidence, b.confidence))
        assert [len(ids) for ids in a.ids] == [len(each) for each in a.confidence]


def test_problems_are_spread_over_the_tasks():
    assert [len(some) for some in mixed(8, 1999, "llama").values()] == [3, 3, 2]


def test_similar_steps(tmp_path, monkeypatch, capsys):
    arguments = ["--development", "--problems", "2", "--distances", "1"]
    call(similar_steps, monkeypatch, tmp_path, tmp_path / "none.md", *arguments)
    with (tmp_path / "similar_steps-llama.csv").open() as file:
        rows = {row["share"]: row for row in csv.DictReader(file)}
    assert rows["nothing"]["steps that share"] == rows["nothing"]["bytes saved"] == "0.0"
    assert rows["nothing"]["nats per token"] == "0.0000"
    saved = [float(rows[mode]["bytes saved"]) for mode in ("values", "keys and values")]
    assert 0 < saved[0] < saved[1]
    before = capsys.readouterr().out
    call(similar_steps, monkeypatch, tmp_path, tmp_path / "none.md", *arguments)
    assert capsys.readouterr().out == before  # nothing was missing


def test_rksc(tmp_path, monkeypatch):
    document = markers(tmp_path / "page.md", "semantic-llama", "lens-llama")
    monkeypatch.setattr(rksc, "LENSES", dict([*rksc.LENSES.items()][:1]))
    call(rksc, monkeypatch, tmp_path, document, "--problems", "3")
    page = document.read_text()
    assert "same facts, other order" in page and "decided early" in page


@pytest.mark.parametrize("task", ["chain", "walk"])
def test_reordered_prompts_mean_the_same(task):

    for problem in make_problems(task, 5, 1999, "qwen3"):
        other = rksc.reordered(problem, random.Random(1))
        assert other != problem.prompt and sorted(other.split()) == sorted(problem.prompt.split())
        question = problem.prompt.rsplit(" . ", 1)[1]
        assert other.endswith(" . " + question)
        assert check(problem, problem.solution).correct
        facts = [
            sorted(text.removeprefix("<bos> ").removeprefix("RULE ").split(" . ")[:-1])
            for text in (problem.prompt, other)
        ]
        assert facts[0] == facts[1]
