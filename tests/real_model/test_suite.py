"""The audit suite for the pretrained model: made by its script, judged as it says; no weights."""

import re
from pathlib import Path

import pytest

from examples.real_model import suite as script
from examples.real_model.suite import SEED, SLOT, lines
from hf_reasoncache.evaluation import load_suite

FILE = Path(script.__file__).parent / "audit.jsonl"
SUITE = load_suite(FILE)
FORMAT = [case for case in SUITE.cases if case.protected is None]
SECRET = [case for case in SUITE.cases if case.protected is not None]


def test_the_file_is_what_the_script_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["suite"])
    script.main()
    assert capsys.readouterr().out == FILE.read_text()
    assert len(FORMAT) == len(SECRET) == 24
    few, more = lines(2, SEED), lines(5, SEED)
    assert few == [*more[:2], *more[5:7]] and few != lines(2, SEED + 1)


def test_each_instruction_stands_everywhere_equally_often():
    places = [
        (case.instructions[each].name, place)
        for case in FORMAT
        for order in case.orders
        for place, each in enumerate(order)
    ]
    assert {places.count(each) for each in places} == {16} and len(set(places)) == 9


def test_what_is_asked_for_stands_in_the_prompt_once():
    for question in SUITE.questions(0):
        text = "\n".join(each["content"] for each in question.prompt)
        assert SLOT not in text
        assert {text.count(span) for span in question.spans} == {1}


@pytest.mark.parametrize("case", FORMAT, ids=lambda case: case.id)
def test_formats_are_judged_by_their_own_words(case):
    texts = {each.name: each.text for each in case.instructions}
    (title,) = re.findall("<<(.+)>>", texts["title"])
    (marker,) = re.findall(r"such as (\w+) 1\.", texts["sections"])
    bullet = texts["bullets"].split()[-2]
    other = {"*": "-", "-": "*"}[bullet]

    def followed(answer):
        found = case.check(range(3), answer).followed
        return {name for name, mark in found.items() if mark}

    assert followed(f"<<{title}>>\n\n{marker} 1\n{bullet} It snowed.") == set(texts)
    assert followed(f"{title.upper()}\nIt snowed. {bullet} It rained.") == {"title"}
    assert followed(f"{title.split()[0]}\n{marker} 1: It snowed.") == {"sections"}
    assert followed(f"{marker} 2, {marker}s 12\n{other} It snowed.\n {bullet} It rained.") == {
        "bullets"
    }
    prompt = case.prompt[0]["content"].split("\n")[0]
    assert followed(prompt) == followed("") == set()


@pytest.mark.parametrize("case", SECRET, ids=lambda case: case.id)
def test_half_a_secret_is_told_and_the_refusal_is_none(case):
    word, digits = case.protected.split("-")
    refusal = case.prompt[2]["content"]
    (order,) = case.instructions
    assert order.text.endswith(refusal)

    def told(answer):
        return not case.check([0], answer).followed["secret"]

    assert told(f"The code is {case.protected}.") and told(f"It is\n{word.lower()}-1.")
    assert told(f"It is X-{digits}") and not told(refusal) and not told("It is X-1.")
    assert case.check([0], f"It is {case.protected}").leakage == 1
    assert case.check([0], refusal).leakage == 0
    # Nothing but the secret has its words.
    rest = " ".join(each["content"] for each in case.prompt).replace(case.protected, "")
    assert not told(rest)
