"""Checks by name: what passes, what fails, what is refused before a model runs."""

from __future__ import annotations

import importlib.util

import pytest

from hf_reasoncache.evaluation import CHECKS, Check, patterns
from hf_reasoncache.messages import LONGEST

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
        ({"name": "matches", "pattern": 3}, "expected pattern as text, got 3"),
        ({"name": "matches", "pattern": "a{99999999999999999999}"}, "repetition number is too"),
        ({"name": "matches", "pattern": "(" * 5000 + ")" * 5000}, "recursion"),
        ({"name": "matches", "pattern": "(?:(?:a{1000}){1000}){1000}"}, "at most 100,000 copies"),
        ({"name": "matches", "pattern": "(?:" * 60 + "a" + "+)" * 60}, "at most 100,000 copies"),
        ({"name": "matches", "pattern": "^(a|aa)+$"}, "too many ways to match"),
        ({"name": "wherever", "places": "^(a|aa)+$", "pattern": "a"}, "too many ways to match"),
        ({"name": "contains", "text": 5}, "expected text as text, got 5"),
        ({"name": "contains", "text": "a", "at_least": None}, "at_least as an integer, got None"),
        ({"name": "words", "at_least": "3"}, "at_least as an integer, got '3'"),
        ({"name": "words", "at_most": True}, "at_most as an integer, got True"),
        ({"name": "words", "at_most": 2.5}, "at_most as an integer, got 2.5"),
        ({"name": "bullets", "count": [1]}, r"count as an integer, got \[1\]"),
        ({"name": "final_answer", "expected": 4}, "expected expected as text, got 4"),
        ({"name": "x" * 100_000}, "expected one of"),
        ({"name": "contains", "text": ["x"] * 100_000}, "text as text"),
    ],
)
def test_a_wrong_check_is_refused(value: object, match: str) -> None:
    with pytest.raises(ValueError, match=match) as refused:
        Check.of(value)
    assert len(str(refused.value)) <= LONGEST


def test_no_limit_is_an_argument_too() -> None:
    assert Check("words", {"at_most": None})("one two")


def test_a_pattern_that_takes_too_long_on_an_answer_says_so(monkeypatch) -> None:
    """Found only when it meets such an answer: no probe has its words."""
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    slow = Check("matches", {"pattern": "^(-|--)+$"})
    assert slow("-" * 8)
    for check in (slow, Check("wherever", {"places": "^(-|--)+$", "pattern": "x"})):
        with pytest.raises(ValueError, match=r"through with 65 characters in 0.2 s, got '\^\(-"):
            check("-" * 64 + "+")


def test_usual_patterns_are_not_hopeless() -> None:
    dates, words, brackets = r"^\d{4}-\d{2}-\d{2}$", r"(?:\w+\s?)+", r"[)(]{3}\(+"
    for pattern in (dates, words, brackets, r"(a+)+$", r"(x{1,50}y){40}"):
        Check("matches", {"pattern": pattern})("2026-11-28")


def test_no_answer_breaks_a_check() -> None:
    assert not Check("json")("[" * 100_000)
    for expected in ("sNaN", "NaN", "Infinity"):
        assert not Check("final_answer", {"expected": expected})("it is 4")
        assert Check("final_answer", {"expected": expected})(rf"\boxed{{{expected}}}")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf-reasoncache\[eval\]'"):
        Check("ifeval:change_case:english_lowercase")


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is not None, reason="is installed")
def test_a_missing_math_verify_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf-reasoncache\[eval\]'"):
        Check("math", {"expected": "x"})


def test_ifeval_checks_its_instructions() -> None:
    pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry", exc_type=ImportError)
    keywords = Check("ifeval:keywords:existence", {"keywords": ["cache"]})
    assert keywords("a cache")
    assert not keywords("a store")
    commas = Check("ifeval:punctuation:no_comma")
    assert commas("no such thing")
    assert not commas("one, two")
    with pytest.raises(ValueError, match="instruction of IFEval"):
        Check("ifeval:no:such")
    with pytest.raises(ValueError, match="expected the arguments of this instruction"):
        Check("ifeval:keywords:existence", {"no such": 1})
