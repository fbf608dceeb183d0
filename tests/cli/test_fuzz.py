"""Whatever a file or a command line says, it is read or refused in one line, without a traceback.

Profiles are in tests/calibration/test_hostile_files.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from examples.tiny_reasoner import MODELS
from hf_reasoncache.calibration.prompts import read_prompts
from hf_reasoncache.cli import main
from hf_reasoncache.evaluation import load_suite, load_task
from hf_reasoncache.evaluation.preparation import prepare
from hf_reasoncache.messages import LONGEST

MODEL = MODELS["llama"]
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
ANSWERS = ("", "so 4 or -1,200.5", r"\boxed{sNaN}", "[" * 20_000, "a b", "\u2028é")

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 10**30, 0.0, 0.5, 1e308, "x" * 5000, "\ud800", "\x1b[2J"])
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
PATTERNS = st.text("ab.*+?(){}[]|^$\\d1,:-", max_size=12)
CHECKS = st.fixed_dictionaries(
    {"name": st.sampled_from(["contains", "words", "matches", "wherever", "final_answer", "json"])},
    optional={
        "text": st.just("a") | VALUES,
        "at_least": st.just(1) | VALUES,
        "at_most": st.just(3) | VALUES,
        "pattern": PATTERNS | VALUES,
        "places": PATTERNS | VALUES,
        "expected": st.just("4") | VALUES,
    },
)
INSTRUCTION = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a", "b"]) | VALUES,
        "text": st.just("Do.") | VALUES,
        "check": CHECKS | st.just("lowercase") | VALUES,
    }
)
MESSAGE = st.fixed_dictionaries({"role": st.just("user"), "content": st.just("walk") | VALUES})
PROMPT = st.sampled_from(["walk", "[[instruction]] walk", "walk [[instruction]][[instruction]]"])
LINE = st.fixed_dictionaries(
    {},
    optional={
        "prompt": PROMPT | VALUES,
        "messages": st.lists(MESSAGE, max_size=2) | VALUES,
        "answer": st.just("4") | VALUES,
        "check": CHECKS | VALUES,
        "id": st.just("n") | VALUES,
        "max_new_tokens": st.just(3) | VALUES,
        "spans": st.just(["walk"]) | VALUES,
        "instructions": st.lists(INSTRUCTION, max_size=2) | VALUES,
        "orders": st.lists(st.permutations([0, 1]), max_size=2) | VALUES,
        "protected": st.just("walk") | VALUES,
        "alone": st.booleans() | VALUES,
    },
)
TEXT = LINE.map(json.dumps) | st.binary(max_size=40).map(lambda data: data.decode("latin-1"))


@settings(max_examples=120)
@given(st.lists(TEXT, min_size=1, max_size=2), st.sampled_from(["task", "suite", "prompts"]))
@example(['{"prompt": "a", "check": {"name": "matches", "pattern": "^(a|aa)+$"}}'], "task")
@example(["[" * 100_000], "suite")
def test_json_lines(tmp_path_factory: pytest.TempPathFactory, lines: list[str], kind: str) -> None:
    """What is accepted can be asked, and whatever the answer is, judged."""
    path = tmp_path_factory.mktemp("fuzz") / "x.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    try:
        if kind == "prompts":
            for prompt in read_prompts(str(path)).prompts:
                prompt.encode(TOKENIZER, chat=False)
            return
        task = load_task(str(path)) if kind == "task" else load_suite(path)
        batches = prepare(task.questions(0), TOKENIZER, chat=False, size=2)
    except ValueError as error:
        message = str(error).replace(str(path), "x.jsonl")
        assert "expected" in message and len(message) <= LONGEST and message.isprintable()
        return
    for question in [question for batch in batches for question in batch.questions]:
        json.dumps([question.id, question.spans], ensure_ascii=False).encode()
        for answer in ANSWERS:
            assert task.check(question, answer).correct in (None, True, False)


NUMBERS = st.integers().map(str) | st.sampled_from(
    ["0", "1", "64", "0.5", "-1", "nan", "inf", "-inf", "1e400", "9" * 30, "9" * 5000, "1,64", ","]
)
WORDS = st.text(max_size=12) | st.sampled_from(["", "auto", "x" * 5000, "\udc80", "a:b", "../.."])
OPTIONS: dict[str, Any] = {
    **dict.fromkeys(
        ["--budgets", "--budget", "--context", "--batch", "--batch-size", "--max-new-tokens"],
        NUMBERS | WORDS,
    ),
    **dict.fromkeys(["--seeds", "--seed", "--window", "--buffer", "--threads"], NUMBERS | WORDS),
    **dict.fromkeys(["--temperature", "--limit", "--interval", "--queries", "--rows"], NUMBERS),
    **dict.fromkeys(["--min-following", "--bandwidth", "--flops", "--reserve"], NUMBERS),
    **dict.fromkeys(["--prompt", "--branches", "--memory", "--weights"], NUMBERS | WORDS),
    **dict.fromkeys(["--gpu", "--dtype", "--device", "--estimator", "--scorer", "--task"], WORDS),
    "--cache": WORDS
    | st.tuples(
        st.sampled_from(["snapkv", "sliding-window", "reason-alloc"]),
        st.sampled_from(["window", "ratio", "fair", "buffer", "recent", "heads", "profile"]),
        NUMBERS | WORDS,
    ).map(lambda parts: "{}:{}={}".format(*parts)),
}


@settings(
    max_examples=120,
    # Each example leaves the fixtures as they were.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(["plan", "plan", "evaluate", "audit", "calibrate", "show", "compare"]),
    st.lists(
        st.sampled_from(sorted(OPTIONS)).flatmap(
            lambda name: OPTIONS[name].map(lambda value: (name, value))
        ),
        max_size=4,
    ),
)
@example("plan", [("--context", "4096"), ("--budget", "512")])
@example("plan", [("--context", "9" * 30), ("--budget", "512"), ("--cache", "sliding-window")])
def test_command_lines(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: list[tuple[str, str]],
) -> None:
    """Models are not found, so what is not refused before ends there; plans are computed."""
    suite = MODEL / "audit.jsonl"
    usual: dict[str, dict[str, object]] = {
        "plan": {"--context": 4096, "--budget": 512, "--memory": "1GB"},
        "evaluate": {"--task": "collections:OrderedDict", "--cache": "snapkv", "--budgets": 64},
        "audit": {"--suite": suite, "--cache": "snapkv", "--budgets": 64, "--limit": 1},
        "calibrate": {"--prompts": suite},
    }
    model = MODEL if name in ("plan", "show") else "no/such/model"
    out = {"--out": tmp_path / "out"} if name in usual and name != "plan" else {}
    given = {**usual.get(name, {}), **out, **dict(options)}
    arguments = [str(part) for pair in given.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["hf-reasoncache", name, str(model), *arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    if isinstance(ended.value.code, str):
        said += ended.value.code
    assert all(len(line) <= LONGEST for line in said.splitlines())
    assert "Traceback" not in said
    assert ended.value.code == 0 or said
