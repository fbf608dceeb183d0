"""Checks by name: what passes, what fails, what is refused before a model runs."""

from __future__ import annotations

import importlib.util

import pytest

from hf_reasoncache.evaluation import CHECKS, Check

# For each check: arguments, an answer that passes, one that does not.
CASES = {
    "contains": ({"text": "Red", "at_least": 2}, "red, RED", "red"),
    "excludes": ({"text": "red"}, "blue", "a Red one"),
    "matches": ({"pattern": "^a.*z$"}, "a\nz", "a z b"),
    "wherever": ({"places": r"#\d [^#]*", "pattern": "ok"}, "#1 ok #2 ok", "#1 ok #2 no"),
    "starts_with": ({"text": "So"}, " So be it", "And So"),
    "ends_with": ({"text": "end."}, "the end.\n", "end. No"),
    "words": ({"at_least": 2, "at_most": 3}, "one two", "one two three four"),
    "bullets": ({"count": 2}, "* a\n - b", "* a"),
    "lowercase": ({}, "all low 1", "Not"),
    "uppercase": ({}, "ALL 1", "ALl"),
    "json": ({}, '```json\n{"a": 1}\n```', "{a: 1}"),
    "final_answer": ({"expected": "1,200"}, "not 7 but 1200.0", "1200 or 7"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_check_tells_right_from_wrong(name: str) -> None:
    arguments, right, wrong = CASES[name]
    check = Check.of({"name": name, **arguments})
    assert check(right)
    assert not check(wrong)


def test_every_check_is_tried() -> None:
    assert set(CHECKS) == {*CASES, "math"}


def test_the_last_box_is_the_answer() -> None:
    check = Check("final_answer", {"expected": "x^2"})
    assert check(r"\boxed{3} or rather \boxed{x ^2} as 4")
    assert not check("x^2")


def test_nothing_follows_an_instruction_for_no_place() -> None:
    assert not Check("wherever", {"places": "#", "pattern": ""})("")


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("nonsense", "expected one of"),
        (7, "a name or an object"),
        ({"text": "x"}, "a name or an object"),
        ({"name": "contains"}, "missing a required argument"),
        ({"name": "contains", "text": "x", "size": 1}, "unexpected keyword"),
        ({"name": "matches", "pattern": "("}, "unterminated"),
    ],
)
def test_a_wrong_check_is_refused(value: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Check.of(value)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf-reasoncache\[eval\]'"):
        Check("ifeval:change_case:english_lowercase")("x")


def test_ifeval_checks_its_instructions() -> None:
    pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry", exc_type=ImportError)
    keywords = Check("ifeval:keywords:existence", {"keywords": ["cache"]})
    assert keywords("a cache")
    assert not keywords("a store")
    commas = Check("ifeval:punctuation:no_comma")
    assert commas("no such thing")
    assert not commas("one, two")
    with pytest.raises(ValueError, match="instruction of IFEval"):
        Check("ifeval:no:such")("x")
