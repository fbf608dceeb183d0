"""Files of questions and suites, arms as the command line writes them, and the shipped suites."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from examples.tiny_reasoner import MODELS, TEST_SEEDS, check, make_problems
from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache
from hf_reasoncache.evaluation import Suite, Task, load_suite, load_task, parse_arm
from hf_reasoncache.evaluation.arms import FULL_ARM, parse_budget
from hf_reasoncache.evaluation.suite import SLOT
from hf_reasoncache.protection import Spans

INSTRUCTIONS = [
    {"name": "low", "text": "Write low.", "check": "lowercase"},
    {"name": "red", "text": "Say red.", "check": {"name": "contains", "text": "red"}},
]
CASE = {"prompt": f"{SLOT} Why? {SLOT}", "instructions": INSTRUCTIONS}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_questions_is_a_task(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2 + 2?", "answer": 4},
        {"id": "b", "messages": [{"role": "user", "content": "x"}], "check": "lowercase"},
    ]
    task = load_task(str(write(tmp_path / "sums.jsonl", *rows)))
    assert isinstance(task, Task)
    assert task.name == "sums"
    first, second = task.questions(0)
    assert (first.id, second.id) == ("1", "b")
    assert task.check(first, "so 4").correct is True
    assert task.check(first, "4, no 5").correct is False
    assert task.check(second, "X").correct is False


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ([], "expected a JSON object, got list"),
        ({"prompt": ""}, "'check' or 'answer'"),
        ({"answer": 1}, "expected 'prompt' as text"),
        ({"prompt": "x", "check": "no"}, "expected one of"),
        ({"prompt": "x", "answer": 1, "max_new_tokens": 0}, "integer >= 1"),
        ({"prompt": "x", "answer": 1, "spans": "x"}, "list of texts"),
        ({"prompt": "x", "answer": 1, "id": "good"}, "an id of its own"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: object, match: str) -> None:
    path = write(tmp_path / "x.jsonl", {"id": "good", "prompt": "x", "answer": 1}, row)
    with pytest.raises(ValueError, match=match) as refused:
        load_task(str(path))
    assert f"{path}:2" in str(refused.value)


def test_a_task_can_be_python() -> None:
    with pytest.raises(ValueError, match=r"FILE.jsonl or module:name"):
        load_task("nothing")
    with pytest.raises(ValueError, match="no_such"):
        load_task("json:no_such")
    with pytest.raises(ValueError, match=r"expected an evaluation.Task"):
        load_task("collections:OrderedDict")


def test_a_case_is_asked_in_orders_and_alone(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path / "s.jsonl", CASE))
    prompts = {question.id: question.prompt for question in suite.questions(0)}
    assert prompts == {
        "1/0-1": "Write low. Why? Say red.",
        "1/1-0": "Say red. Why? Write low.",
        "1/0": "Write low. Why? ",
        "1/1": " Why? Say red.",
    }
    spans = {question.id: question.spans for question in suite.questions(0)}
    assert spans["1/1-0"] == ("Say red.", "Write low.")
    assert suite.classes == ["low", "red"]
    assert isinstance(suite, Task)


def test_one_slot_takes_all_and_protected_text_leaks(tmp_path: Path) -> None:
    row = {
        "id": "a",
        "messages": [{"role": "system", "content": f"The code is blue owl.\n{SLOT}"}],
        "instructions": INSTRUCTIONS,
        "orders": [[1, 0]],
        "alone": False,
        "protected": "The code is blue owl.",
        "check": {"name": "contains", "text": "yes"},
    }
    suite = load_suite(write(tmp_path / "s.jsonl", row))
    (question,) = suite.questions(0)
    text = "The code is blue owl.\nSay red.\nWrite low."
    assert question.prompt == ({"role": "system", "content": text},)
    assert question.spans == ("Say red.", "Write low.", "The code is blue owl.")
    found = suite.check(question, "Yes, red; the owl is blue")
    assert found.correct
    assert found.followed == {"red": True, "low": False}
    assert found.leakage == pytest.approx(3 / 5)  # the, is, blue


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"instructions": []}, "'instructions' as a list"),
        ({"instructions": [{"name": "x", "text": "y"}]}, "name, text and check"),
        ({"instructions": INSTRUCTIONS * 2}, "names of their own"),
        ({"prompt": "none"}, "got it 0 times"),
        ({"orders": [[0, 0]]}, "permutations of 0 to 1"),
        ({"orders": []}, "at least one"),
        ({"orders": 3}, "not iterable"),
        ({"alone": 1}, "true or false"),
        ({"protected": "absent"}, "a text of the prompt"),
        ({"protected": ""}, "list of texts"),
    ],
)
def test_a_wrong_case_is_refused(tmp_path: Path, change: dict, match: str) -> None:
    path = write(tmp_path / "s.jsonl", CASE | change)
    with pytest.raises(ValueError, match=match) as refused:
        load_suite(path)
    assert f"{path}:1" in str(refused.value)


@pytest.mark.parametrize("family", MODELS)
def test_the_shipped_suite_judges_as_the_tasks_do(family: str) -> None:
    suite = load_suite(MODELS[family] / "audit.jsonl")
    problems = make_problems("instr", len(suite.cases), TEST_SEEDS[400], family)
    for case, problem in zip(suite.cases, problems, strict=True):
        words = problem.solution.split()
        names = [each.name for each in case.instructions]
        broken = problem.solution.replace("EACH " + problem.instructions["EACH"], "EACH the", 1)
        early = " ".join(words[: words.index("</think>")])
        for text in (problem.solution, broken, early):
            answer = text.removesuffix(" <eos>")
            outcome, found = check(problem, answer), case.check(range(len(names)), answer)
            assert found.correct == outcome.correct
            assert found.followed == {name: all(outcome.followed[name]) for name in names}
        assert not any(case.check(range(len(names)), "").followed.values())


def test_each_instruction_stands_everywhere_equally_often() -> None:
    suite: Suite = load_suite(MODELS["llama"] / "audit.jsonl")
    places = [
        (case.instructions[each].name, place)
        for case in suite.cases
        for order in case.orders
        for place, each in enumerate(order)
    ]
    assert {places.count(each) for each in places} == {8}


def test_arms_are_caches() -> None:
    config = AutoConfig.from_pretrained(MODELS["llama"])
    spans = Spans((((1, 3),),))
    arm = parse_arm("snapkv:protect,fair=0.5,window=4", buffer=16)
    cache = arm.make(config, 64, spans, seed=0)
    assert isinstance(cache, ReasonAllocCache)
    policy = cache.layers[0].policy
    assert (policy.window, policy.buffer, policy.head_budgets) == (4, 16, False)
    assert policy.protection.keep == policy.protection.fair.spans == spans
    assert policy.scorer.queries == 4
    windows = parse_arm("sliding-window:recent=16").make(config, 0.5, None, seed=0)
    assert isinstance(windows, SlidingWindowCompressCache)
    assert windows.layers[0].policy.kept == 64
    assert parse_arm("random").make(config, 64, None, seed=7).layers[0].policy.scorer.seed == 7
    assert parse_arm("full") is FULL_ARM


@pytest.mark.parametrize(
    "text", ["x", "full:window=3", "snapkv:ratio=1", "rkv:window=x", "rkv:heads=x", "rkv:scorer=x"]
)
def test_a_wrong_arm_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--cache"):
        parse_arm(text)


def test_arms_refuse_what_they_cannot_do() -> None:
    config = AutoConfig.from_pretrained(MODELS["llama"])
    with pytest.raises(ValueError, match="questions with spans"):
        parse_arm("snapkv:protect").make(config, 64, None, 0)
    with pytest.raises(ValueError, match="budget in tokens, got the ratio"):
        parse_arm("snapkv").make(config, 0.5, None, 0)
    with pytest.raises(ValueError, match="pass --budgets"):
        parse_arm("snapkv").make(config, None, None, 0)
    for text in ("0", "1.5", "-3", "x"):
        with pytest.raises(ValueError, match="--budgets"):
            parse_budget(text)
    assert (parse_budget("64"), parse_budget("0.25")) == (64, 0.25)
