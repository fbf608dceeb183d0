"""A run answers all of a grid, survives a kill, and refuses another run's answers."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, make_problems
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.evaluation import (
    Grid,
    Judgement,
    Question,
    Record,
    Settings,
    baseline,
    evaluate,
    harness,
    parse_spec,
    tabulate,
)
from hf_reasoncache.evaluation.journal import Journal
from hf_reasoncache.evaluation.reread import reread
from hf_reasoncache.evaluation.specs import FULL, controls
from hf_reasoncache.evaluation.table import cells, markdown_table, text_table
from hf_reasoncache.outputs import sole_writer
from hf_reasoncache.processes import Processes

SPEC = parse_spec("snapkv:prompt=evict", window=16, buffer=16)
ALONE = Processes(cpu=True)
SETTINGS = Settings(max_new_tokens=60, batch_size=2)


class Walks:
    """Walks of the tiny reasoner; its answers are cut off: right if its steps are, up to there."""

    name = "walks"

    def __init__(self, count: int = 3) -> None:
        self.count = count

    def questions(self, seed: int) -> Sequence[Question]:
        problems = make_problems("walk", self.count, DEVELOPMENT_SEEDS[700 + seed], "llama")
        self.problems = {str(n): problem for n, problem in enumerate(problems)}
        return [
            Question(id=n, prompt=each.prompt, spans=(each.prompt.split(" . ")[0],))
            for n, each in self.problems.items()
        ]

    def check(self, question: Question, answer: str) -> Judgement:
        truth, steps = (
            re.findall(r"#\d+ \S+ \d \d \S+ \S+", text)
            for text in (self.problems[question.id].solution, answer)
        )
        return Judgement(correct=bool(steps) and truth[: len(steps)] == steps)


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    return load(MODELS["llama"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "answers.jsonl"


def run(loaded, path: Path, grid: Grid | None = None, settings: Settings = SETTINGS):
    grid = grid or Grid([Walks()], [SPEC], [48])
    return evaluate(*loaded, grid, path, settings, progress=False)


def untimed(records: Sequence[Record]) -> list[Record]:
    return [replace(record, seconds=0.0) for record in records]


def test_answers_are_those_of_generate(loaded, path: Path) -> None:
    model, tokenizer = loaded
    records = run(loaded, path)
    assert [(each.cache, each.budget, each.question) for each in records] == [
        (name, budget, n) for name, budget in (("full", None), (SPEC.name, 48)) for n in "012"
    ]
    model.set_attn_implementation("sdpa")
    for record, question in zip(records[:3], Walks().questions(0), strict=True):
        inputs = tokenizer(question.prompt, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=60)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert record.answer == tokenizer.decode(new)
        assert (record.tokens, record.finished) == (60, False)
        assert record.held == pytest.approx(record.prompt_tokens + 30, abs=12)
        assert record.keep_rates == []
    for record in records[3:]:
        assert record.evicted > 0
        assert record.held < 48 + 16
        assert len(record.keep_rates) == 4
        assert all(0 <= rate < 1 for layer in record.keep_rates for rate in layer)


def test_a_run_that_was_killed_goes_on(loaded, path: Path, monkeypatch) -> None:
    whole = run(loaded, path)
    lines = path.read_bytes().splitlines(keepends=True)
    # Killed while the second answer of the last batch but one was written.
    path.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    calls = []
    answer = harness.answer_batch

    def counted(model, prompts, cache, **settings):
        calls.append((type(cache), len(prompts)))
        return answer(model, prompts, cache, **settings)

    monkeypatch.setattr(harness, "answer_batch", counted)
    assert untimed(run(loaded, path)) == untimed(whole)
    assert calls == [(ReasonAllocCache, 2), (ReasonAllocCache, 1)], "only what was missing"
    calls.clear()
    assert untimed(run(loaded, path)) == untimed(whole)
    assert not calls


def test_more_of_a_plan_adds_to_the_file(loaded, path: Path) -> None:
    first = run(loaded, path)
    more = run(loaded, path, Grid([Walks()], [SPEC], [48, 64], seeds=(0, 1)))
    assert len(more) == 2 * 3 * 3
    assert untimed([each for each in more if each.seed == 0 and each.budget != 64]) == untimed(
        first
    )


def test_another_runs_answers_are_refused(loaded, path: Path) -> None:
    run(loaded, path)
    with pytest.raises(ValueError, match=r"differs in max_new_tokens \(60 there, 50 now\)"):
        run(loaded, path, settings=replace(SETTINGS, max_new_tokens=50))
    other = replace(SPEC, settings=SPEC.settings | {"buffer": 32})
    with pytest.raises(ValueError, match="others under these names"):
        run(loaded, path, Grid([Walks()], [other], [48]))
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="got another file"):
        run(loaded, path)
    path.write_text("text\n")
    with pytest.raises(ValueError, match=r"answers.jsonl:1: expected JSON"):
        run(loaded, path)


def test_samples_differ_by_seed_and_not_by_run(loaded, tmp_path: Path) -> None:
    settings = replace(SETTINGS, temperature=1.5)
    grid = Grid([Walks(2)], [], [48])
    state = torch.get_rng_state()
    first = run(loaded, tmp_path / "a", grid, settings)
    again = run(loaded, tmp_path / "b", grid, settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert untimed(first) == untimed(again)
    assert first[0].answer != run(loaded, tmp_path / "c", grid, SETTINGS)[0].answer


def test_each_cache_is_compared_with_random_eviction_under_its_protection() -> None:
    names = (
        "rkv", "rkv:prompt=evict", "rkv:prompt=evict,profile=a", "rkv:protect",
        "rkv:protect,fair=0.5",
        "random:prompt=evict", "random:prompt=evict,profile=a", "random:protect",
        "reason-alloc:scorer=random",
    )  # fmt: skip
    specs = [FULL, *map(parse_spec, names)]
    usual = baseline(8, 128)
    found = controls(specs[:6], usual)
    assert set(found.values()) == {usual.name}
    assert controls(specs, usual) == {
        "rkv": "reason-alloc:scorer=random",
        "rkv:prompt=evict": "random:prompt=evict",
        "rkv:prompt=evict,profile=a": "random:prompt=evict,profile=a",
        "rkv:protect": "random:protect",
        "rkv:protect,fair=0.5": usual.name,
    }
    assert controls(specs[:2], None) == {}


def test_the_baseline_is_left_out_aloud_where_it_does_not_fit(loaded, path: Path) -> None:
    said: list[str] = []
    control = baseline(16, 16)
    grid = Grid([Walks()], [SPEC], [48, 400], baseline=control)
    records = evaluate(*loaded, grid, path, SETTINGS, progress=False, say=said.append)
    assert len(said) == 1
    assert "no 'random, prompt kept' at 48" in said[0]
    rows = {
        (row.cache, row.budget): row for row in tabulate(records, controls(grid.specs, control))
    }
    assert (control.name, 48) not in rows
    assert rows[SPEC.name, 48].against_random is None
    assert rows[SPEC.name, 400].against_random is not None
    assert rows[SPEC.name, 400].nothing_evicted
    assert not rows[SPEC.name, 48].nothing_evicted
    assert rows["full", None].against_full is None
    assert rows["full", None].correct.count == 3
    assert rows[SPEC.name, 48].against_full.lost > 0
    assert markdown_table(*cells(list(rows.values()))).count("\n") == 2 + len(rows)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tasks": []}, "tasks: expected at least one"),
        ({"tasks": [Walks(), Walks()]}, "no two alike"),
        ({"specs": [SPEC, SPEC]}, "caches: .* no two alike"),
        ({"budgets": []}, "budgets: expected at least one"),
        ({"seeds": []}, "seeds: expected at least one"),
        ({"seeds": [-1]}, "seeds: expected an integer >= 0, got -1"),
        ({"seeds": [2**64]}, "seeds: expected an integer <= 2147483647"),
        ({"tasks": [Walks(0)]}, "expected questions"),
    ],
)
def test_a_wrong_plan_is_refused(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Grid(**{"tasks": [Walks()], "specs": [SPEC], "budgets": [48]} | change)


def test_answers_read_again_differ_where_greedy_answers_do(loaded, path: Path) -> None:
    """Both ways to the same number: reading the full cache's answer, and writing one's own."""
    model, tokenizer = loaded
    grid = Grid([Walks(2)], [SPEC, parse_spec("random:prompt=evict", 16, 16)], [48])
    records = run(loaded, path, grid)
    found = reread(model, tokenizer, grid, records, path.parent, chat=False)
    tokens = {
        (each.cache, each.budget, each.question): tokenizer(each.answer)["input_ids"]
        for each in records
    }
    for cache, budget in {(each.cache, each.budget) for each in records}:
        agreed = []
        for question in "01":
            full, other = tokens["full", None, question], tokens[cache, budget, question]
            same = [a == b for a, b in zip(full, other, strict=False)]
            agreed.append(same.index(False) if False in same else len(same))
        assert found["walks", cache, budget].until == sum(agreed) / 2, (cache, budget)
    assert found["walks", "random:prompt=evict", 48].never < found["walks", "full", None].never
    again = reread(model, tokenizer, grid, records, path.parent, chat=False)
    assert again == found


def unanswerable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test where a model is asked."""
    monkeypatch.setattr(
        harness, "answer_batch", lambda *_, **__: pytest.fail("a question was answered")
    )


@pytest.mark.parametrize(
    ("spec", "budget", "match"),
    [
        ("snapkv", 60, r"question 'long' with 'snapkv' at 60: budget too small: expected .*>= \d+"),
        ("snapkv:profile=nowhere", 400, "profile: expected a directory that exists"),
        ("snapkv:protect", 30, r"question 'long' with 'snapkv:protect' at 30: budget too small"),
        ("snapkv:fair=2", 400, "fair: expected a number from 0 to 1, got 2.0"),
        ("snapkv:prompt=evict,window=0", 400, "queries >= 1, got 0"),
        ("sliding-window", 90, "question 'long' with 'sliding-window' at 90: max_budget too small"),
        ("sliding-window:protect", 0.1, "question 'long' .* protect: expected at most"),
    ],
)
def test_what_an_arm_refuses_of_one_question_is_said_before_any_is_answered(
    loaded, path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, budget: float, match: str
) -> None:
    class Uneven(Walks):
        def questions(self, seed: int) -> Sequence[Question]:
            short = "<bos> RULE a+ 1 . start a 1 go #3 <think>"
            long = super().questions(seed)[0].prompt
            return [Question(str(n), short, spans=("RULE",)) for n in range(4)] + [
                Question("long", long, spans=(long.partition(" start")[0],))
            ]

    unanswerable(monkeypatch)
    grid = Grid([Uneven()], [parse_spec(spec, buffer=16)], [budget])
    with pytest.raises(ValueError, match=match):
        run(loaded, path, grid)
    assert not path.exists()


def test_spans_that_overlap_are_refused_before_any_question_is_answered(
    loaded, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overlapping(Walks):
        def questions(self, seed: int) -> Sequence[Question]:
            *first, last = super().questions(seed)
            return [*first, replace(last, spans=(*last.spans, last.spans[0].rpartition(" ")[0]))]

    unanswerable(monkeypatch)
    with pytest.raises(ValueError, match="expected spans that do not overlap"):
        run(loaded, path, Grid([Overlapping()], [parse_spec("snapkv:fair=1")], [64]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1, got 0"),
        ({"max_new_tokens": 10**30}, "max_new_tokens: expected an integer <= 2147483647"),
        ({"batch_size": 1.5}, "batch_size: expected an integer"),
        ({"temperature": float("nan")}, "temperature: expected 0 .* got nan"),
        ({"temperature": float("inf")}, "temperature: expected 0 .* got inf"),
    ],
)
def test_wrong_settings_are_refused(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Settings(**change)


def test_two_runs_do_not_write_one_file(loaded, path: Path) -> None:
    path.parent.mkdir()
    refused: list[str] = []

    def second() -> None:
        try:
            run(loaded, path)
        except ValueError as error:
            refused.append(str(error))

    with sole_writer(path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "expected no other run that writes it, got one" in refused[0]
    assert not path.exists()
    run(loaded, path, Grid([Walks(1)], [], [48]))
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_spans_must_be_found_once(loaded, path: Path) -> None:
    class Wrong(Walks):
        def questions(self, seed: int) -> Sequence[Question]:
            return [replace(each, spans=(".",)) for each in super().questions(seed)]

    with pytest.raises(ValueError, match=r"the span '.' once in the prompt, got it \d+ times"):
        run(loaded, path, Grid([Wrong()], [SPEC], [48]))


def test_the_journal_keeps_text_as_it_is(tmp_path: Path) -> None:
    record = Record("t", 0, "a", 64, "q", "d", 3, 'é\n\u2028\x85"', 2, True, None, 5, 0.5)
    with Journal(tmp_path / "j", Record, {"x": 1}, ALONE) as journal:
        journal.add([record])
    assert len((tmp_path / "j").read_bytes().split(b"\n")) == 3
    with Journal(tmp_path / "j", Record, {"x": 1}, ALONE) as journal:
        assert list(journal.records.values()) == [record]
    assert json.loads((tmp_path / "j").read_text("utf-8").split("\n")[0]) == {"settings": {"x": 1}}


def test_a_table_fits_a_terminal_whatever_the_caches_are_called() -> None:
    long = "reason-alloc:prompt=evict,profile=a/directory/with/a/long/name,heads=off,window=32"
    rows = [
        {"cache": name, "budget": "96", "correct": "97.5 (93.0-99.1)", "vs full": "-0.5 (p 1)"}
        for name in ("full", "snapkv:prompt=evict", long)
    ]
    text = text_table(list(rows[0]), rows).split("\n")
    assert max(map(len, text)) <= 80
    assert [line.split("  ")[0] for line in text[:4]] == [
        *("cache", "full", "snapkv [1]", "reason-alloc [2]")
    ]
    assert "".join(text[4:]).replace("    ", "") == f"[1] snapkv:prompt=evict[2] {long}"
    assert text_table(list(rows[0]), rows[:2]).count("\n") == 2, "no key where none is needed"
    assert "snapkv:prompt=evict" in text_table(list(rows[0]), rows[:2])
