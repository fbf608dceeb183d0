"""Files of questions and suites, specs as the command line writes them, and the shipped suites."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from examples.tiny_reasoner import MODELS, TEST_SEEDS, check, make_problems
from hf_reasoncache import ReasonAllocCache, SlidingWindowCompressCache
from hf_reasoncache.evaluation import (
    Judgement,
    Question,
    Suite,
    Task,
    load_suite,
    load_task,
    parse_spec,
)
from hf_reasoncache.evaluation.specs import FULL, parse_budget
from hf_reasoncache.evaluation.suite import SLOT
from hf_reasoncache.messages import LONGEST
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
        ({"prompt": "x", "answer": 1, "max_new_tokens": 10**12}, "integer <= 2147483647"),
        ({"prompt": "x", "answer": 1, "spans": "x"}, "list of texts"),
        ({"prompt": "x", "answer": None}, "'answer' as text or a number, got None"),
        ({"prompt": "x", "answer": ["4"]}, "'answer' as text or a number"),
        ({"prompt": "a \ud800 b", "answer": 1}, "expected Unicode text, got half of a surrogate"),
        ({"prompt": "a", "answer": 1, "\udfff": 1}, "expected Unicode text"),
        ({"prompt": "x", "check": {"name": "contains", "text": 5}}, "expected text as text, got 5"),
        ({"prompt": "x", "check": {"name": "words", "at_least": "3"}}, "as an integer, got '3'"),
        ({"prompt": "x", "answer": 1, "id": "good"}, "an id of its own"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: object, match: str) -> None:
    path = write(tmp_path / "x.jsonl", {"id": "good", "prompt": "x", "answer": 1}, row)
    with pytest.raises(ValueError, match=match) as refused:
        load_task(str(path))
    assert f"{path}:2" in str(refused.value)


@pytest.mark.parametrize("nested", ["[" * 100_000, '{"a":' * 100_000, "[" * 60 + "]" * 60])
@pytest.mark.parametrize("read", [load_task, lambda path: load_suite(Path(path))])
def test_nesting_without_end_is_refused(tmp_path: Path, nested: str, read: Callable) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"prompt": "a", "answer": 1, "more": ' + nested + "}\n")
    with pytest.raises(ValueError, match=r"deep.jsonl:1: expected .*JSON") as refused:
        read(str(path))
    assert len(str(refused.value)) <= LONGEST


def test_a_task_can_be_python() -> None:
    for source in ("nothing", "json:", ":name", "..x:y", "json:no_such", ""):
        with pytest.raises(ValueError, match=r"FILE.jsonl or module:name of a task, got \w+Error"):
            load_task(source)
    with pytest.raises(ValueError, match=r"TypeError: loads\(\) missing 1 .* \(plugins.py:\d+\)"):
        load_task("json:loads")
    with pytest.raises(ValueError, match=r"expected an evaluation.Task"):
        load_task("collections:OrderedDict")


FOREIGN = """
from hf_reasoncache.evaluation import Judgement, Question

class Own:
    name = "own"
    def __init__(self, questions=None, judgement=None):
        self.given, self.judgement = questions, judgement
    def questions(self, seed):
        return self.given(seed)
    def check(self, question, answer):
        return self.judgement(answer)

def fails(seed):
    return {}[seed]

two = lambda seed: (Question(str(n), "x") for n in range(2))
asks = lambda: Own(two, lambda answer: Judgement(1))
raises = lambda: Own(fails, fails)
strange = lambda: Own(lambda seed: ["x"], lambda answer: True)
none = lambda: Own(lambda seed: None, lambda answer: Judgement("x", followed=3))
"""


def test_what_a_module_raises_says_where(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "foreign_task_of_this_test.py").write_text(FOREIGN)
    (tmp_path / "broken_task_of_this_test.py").write_text("name = 1\nname()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"got TypeError: .* \(broken_task_of_this_test.py:2\)"):
        load_task("broken_task_of_this_test:name")
    task = load_task("foreign_task_of_this_test:asks")
    assert isinstance(task, Task) and task.name == "own"
    first, _ = task.questions(0)
    assert task.check(first, "") == Judgement(True)
    task = load_task("foreign_task_of_this_test:raises")
    with pytest.raises(
        ValueError, match=r"questions of seed 7, got KeyError: 7 \(foreign_.*:\d+\)"
    ):
        task.questions(7)
    with pytest.raises(ValueError, match=r"judgement of question '0', got KeyError: 'a' \(foreign"):
        task.check(first, "a")
    task = load_task("foreign_task_of_this_test:strange")
    with pytest.raises(ValueError, match="expected Question objects, got 'x'"):
        task.questions(0)
    with pytest.raises(ValueError, match="expected a Judgement, got True"):
        task.check(first, "")
    task = load_task("foreign_task_of_this_test:none")
    with pytest.raises(ValueError, match="questions of seed 0, got TypeError"):
        task.questions(0)
    with pytest.raises(ValueError, match="got AttributeError"):
        task.check(first, "")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"id": 3}, "an id that is text, got 3"),
        ({"id": "\ud800"}, "Unicode"),
        ({"prompt": 3}, "expected 'prompt' as text"),
        ({"prompt": ({"role": "user"},)}, "expected 'prompt' as text"),
        ({"max_new_tokens": 0}, "integer >= 1"),
        ({"spans": ("",)}, "list of texts"),
    ],
)
def test_a_wrong_question_is_refused(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Question(**{"id": "a", "prompt": "x"} | arguments)


def test_a_judgement_holds_pythons_own_types() -> None:
    found = Judgement(np.bool_(True), {"a": np.int64(1)}, np.float32(0.5))
    assert json.dumps([found.correct, found.followed, found.leakage]) == '[true, {"a": true}, 0.5]'
    with pytest.raises(ValueError, match="leakage: expected a number from 0 to 1, got nan"):
        Judgement(None, leakage=float("nan"))


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
        ({"orders": 3}, "lists of integers"),
        ({"orders": [[0.0, 1]]}, r"permutations of 0 to 1, got \(0.0, 1\)"),
        ({"orders": [[True, 0]]}, "permutations of 0 to 1"),
        ({"orders": [["a", 0]]}, "permutations of 0 to 1"),
        ({"orders": [0, 1]}, "lists of integers"),
        ({"protected": "!", "prompt": f"{SLOT} !"}, "a reference with words"),
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
    spec = parse_spec("snapkv:protect,fair=0.5,window=4", buffer=16)
    cache = spec.make(config, 64, spans, seed=0)
    assert isinstance(cache, ReasonAllocCache)
    policy = cache.layers[0].policy
    assert (policy.window, policy.buffer, policy.head_budgets) == (4, 16, False)
    assert policy.protection.keep == policy.protection.fair.spans == spans
    assert policy.scorer.queries == 4
    windows = parse_spec("sliding-window:recent=16").make(config, 0.5, None, seed=0)
    assert isinstance(windows, SlidingWindowCompressCache)
    assert windows.layers[0].policy.kept == 64
    assert parse_spec("random").make(config, 64, None, seed=7).layers[0].policy.scorer.seed == 7
    assert parse_spec("full") is FULL


@pytest.mark.parametrize("name", ["rkv", "reason-alloc", "sliding-window"])
def test_arms_hold_8_bits(name: str) -> None:
    config = AutoConfig.from_pretrained(MODELS["llama"])
    spec = parse_spec(f"{name}:storage=fp8-keys")
    for cache in (spec.make(config, 96, None, seed=0), spec.make_shared(config, 96, seed=0)):
        assert {layer.store.form.quantised for layer in cache.own_layers} == {("keys",)}


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "full:window=3",
        "snapkv:ratio=1",
        "rkv:window=x",
        "rkv:heads=x",
        "rkv:scorer=x",
        "rkv:storage=x",
    ],
)
def test_a_wrong_arm_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--cache"):
        parse_spec(text)


def test_arms_refuse_what_they_cannot_do() -> None:
    config = AutoConfig.from_pretrained(MODELS["llama"])
    with pytest.raises(ValueError, match="questions with spans"):
        parse_spec("snapkv:protect").make(config, 64, None, 0)
    with pytest.raises(ValueError, match="pass --budgets"):
        parse_spec("snapkv").make(config, None, None, 0)
    for text in ("0", "1.5", "-3", "x", "inf", "-inf", "nan", "1e400", "1e10", "9" * 500):
        with pytest.raises(ValueError, match="--budgets"):
            parse_budget(text)
    assert (parse_budget("64"), parse_budget("0.25")) == (64, 0.25)
