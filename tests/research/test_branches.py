"""The examples of branches run as their page says, on few problems."""

import csv
import random
import sys

import pytest
import torch

from examples.research import compressed_branches, rksc, self_consistency, similar_steps
from examples.research.branch_recordings import Sampling, record_branches
from examples.research.branch_tables import Judge, votes_by_branches
from examples.research.reasoners import REASONERS, mixed
from examples.tiny_reasoner import check, make_problems
from hf_reasoncache.branching import ExitCalibration
from hf_reasoncache.branching.recording import Recording


def markers(path, *names):
    path.write_text("".join(f"<!-- {name} -->\n<!-- end {name} -->\n" for name in names))
    return path


def call(module, monkeypatch, tmp_path, document, *arguments):
    common = ["--reasoner", "llama", "--document", str(document), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [module.__name__, *common, *arguments])
    module.main()


def rows_of(printed):
    head, _, *lines = [line[2:-2].split(" | ") for line in printed.splitlines() if "|" in line]
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def test_self_consistency(tmp_path, monkeypatch, capsys):
    names = ("self_consistency-llama", "votes-llama", "self_consistency-llama-time")
    document = markers(tmp_path / "page.md", *names)
    few = ["--problems", "2", "--held-out", "2", "--branches", "4", "--target", "0.9"]
    few += ["--temperature", "1"]
    few += ["--timed", "2", "--recordings", str(tmp_path / "recordings")]
    call(self_consistency, monkeypatch, tmp_path, document, *few)
    page = document.read_text()
    assert "Calibrated:" in page and "| certain consensus | " in page
    with (tmp_path / "self_consistency-llama.csv").open() as file:
        rows = {row["vote"]: row for row in csv.DictReader(file)}
    assert rows["certain consensus"]["votes changed"].startswith("0.0 ")
    assert rows["certain consensus"]["target"] == "0"
    assert rows["calibrated consensus, stages of 1"]["target"] == "90"
    assert ExitCalibration.load(tmp_path / "exit-llama-consensus-stages.json").stage == 1
    assert (tmp_path / "self_consistency-llama.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "self_consistency-llama-time.csv").open() as file:
        timed = list(csv.DictReader(file))
    assert timed[0]["over prompt per branch: mean, peak"] == "1.00x, 1.00x"
    assert timed[1]["tokens"] == timed[0]["tokens"]  # the same branches, their prompt shared
    assert "Traceback" not in capsys.readouterr().out


def test_recordings_are_read_back_as_they_were(tmp_path, monkeypatch):
    model, tokenizer = REASONERS["llama"].load()
    sampling = Sampling(REASONERS["llama"], 1.0, 3)
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
    assert [len(some) for some in mixed(REASONERS["llama"], 8, 1999).values()] == [3, 3, 2]


def test_similar_steps(tmp_path, monkeypatch, capsys):
    arguments = ["--development", "--problems", "2", "--distances", "1"]
    arguments += ["--recordings", str(tmp_path)]
    call(similar_steps, monkeypatch, tmp_path, tmp_path / "none.md", *arguments)
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert rows["nothing"]["steps that share"] == rows["nothing"]["bytes saved"] == "0.0"
    assert rows["nothing"]["nats per token"] == "0.0000"
    saved = [float(rows[mode]["bytes saved"]) for mode in ("values", "keys and values")]
    assert 0 < saved[0] < saved[1]
    monkeypatch.setattr(similar_steps, "run", None)
    call(similar_steps, monkeypatch, tmp_path, tmp_path / "none.md", *arguments)
    assert capsys.readouterr().out == printed  # nothing was missing


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


def test_compressed_branches(tmp_path, monkeypatch, capsys):
    arguments = ["--development", "--problems", "2", "--branches", "2", "--budgets", "192"]
    arguments += ["--temperature", "0.7", "--recordings", str(tmp_path)]
    call(compressed_branches, monkeypatch, tmp_path, tmp_path / "none.md", *arguments)
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert list(rows) == ["every token", "R-KV, profile", "random, profile"]
    assert int(rows["R-KV, profile"]["KiB per branch"]) < int(rows["every token"]["KiB per branch"])
    assert rows["random, profile"]["against random: lost, gained (p)"] == ""
    monkeypatch.setattr(compressed_branches, "run", None)
    call(compressed_branches, monkeypatch, tmp_path, tmp_path / "none.md", *arguments)
    assert capsys.readouterr().out == printed  # nothing was missing


def test_compressed_branches_are_paired_with_random_and_with_every_token():
    full, chance = compressed_branches.FULL, compressed_branches.CHANCE
    made = [
        compressed_branches.Batch(suffix, budget, "chain", 0, [[v] for v in voted], voted, 2048)
        for suffix, budget, voted in (
            (full, 0, [True, True, True]),
            ("R-KV, profile", 9, [True, True, False]),
            (chance, 9, [False, False, True]),
        )
    ]
    lines = compressed_branches.table(made)
    assert [line["against every token: lost, gained (p)"] for line in lines] == [
        "",
        "1, 0 (1)",
        "2, 0 (0.5)",
    ]
    assert lines[1]["against random: lost, gained (p)"] == "1, 2 (1)"
    assert "single branch" not in lines[0] and lines[0]["KiB per branch"] == "2"


def test_votes_by_branches_count_every_branch_once():
    def recording(*answers):
        ids = tuple(torch.tensor([1, 2]) for _ in answers)
        confidence = tuple(torch.tensor([[0.9, 0.1, 2.0]] * 2) for _ in answers)
        return Recording(ids, confidence, answers, (True,) * len(answers))

    problems = make_problems("chain", 2, 1999, "llama")
    right, wrong = problems[0].answer, "none"
    recordings = [recording(right, right, wrong, right), recording(wrong, "other", wrong, "x")]
    lines = votes_by_branches(recordings, Judge(REASONERS["llama"], problems))
    assert [line["branches"] for line in lines] == ["1", "2", "4"]
    # Two branches that differ: the first counts, which is right in one of the two pairs.
    assert [line["majority"].split()[0] for line in lines] == ["37.5", "25.0", "50.0"]


@pytest.mark.parametrize("name", ["smollm2", "smollm2-short"])
def test_chat_reasoners_read_whole_answers(name):
    reasoner = REASONERS[name]
    for some in mixed(reasoner, 6, 1999).values():
        for problem in some:
            answer = reasoner.read_answer(problem.chain + "<|im_end|>")
            assert reasoner.is_right(problem, answer)
            assert not reasoner.is_right(problem, None)
            assert not reasoner.is_right(problem, answer.replace(problem.answer[0], "nothing"))
            unfinished = problem.chain.removesuffix(".")
            assert reasoner.read_answer(unfinished) is None
