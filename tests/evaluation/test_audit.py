"""The measures of an audit on answers made up so that every one of them is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from hf_reasoncache.evaluation import Limits, Record, Suite, analyse
from hf_reasoncache.evaluation.audit_report import markdown, write_report
from hf_reasoncache.evaluation.checks import Check
from hf_reasoncache.evaluation.suite import SLOT, Case, Instruction

NAMES = ("a", "b", "c")
SUITE = Suite(
    "made up",
    tuple(
        Case(
            id=str(number),
            prompt=f"Secret words here. {SLOT}",
            instructions=tuple(
                Instruction(n, f"Do {n}.", Check("contains", {"text": n})) for n in NAMES
            ),
            orders=((0, 1, 2), (2, 1, 0)),
            protected="Secret words here.",
            correct=Check("ends_with", {"text": "!"}),
        )
        for number in range(4)
    ),
)


def records(cache: str, budget: int | None, answers: dict[str, str]) -> list[Record]:
    """Records of all questions; an answer by the end of the question's id, or else all is well."""
    found = []
    for question in SUITE.questions(0):
        answer = next((a for end, a in answers.items() if question.id.endswith(end)), "a b c!")
        judged = SUITE.check(question, answer)
        places = [0.25 * n for n in range(1, len(question.spans) + 1)]
        record = Record(
            SUITE.name, 0, cache, budget, question.id, "d", 9, answer, 3, True, None, 5, 0.1
        )
        found.append(
            replace(
                record,
                correct=judged.correct,
                followed=dict(judged.followed),
                leakage=judged.leakage,
                keep_rates=[] if budget is None else [places, places],
            )
        )
    return found


FULL = records("full", None, {})
# In the reversed order "a" comes last and is forgotten; one answer gives the secret away.
LATE = records("late", 64, {"1/2-1-0": "b c: secret words", "2-1-0": "b c!", "3/1": "no!"})
ALL = analyse(SUITE, FULL + LATE)


def test_rates_losses_and_orders() -> None:
    full, late = ALL.cells
    assert full is ALL.full
    assert [str(each.together) for each in full.classes] == [str(full.classes[0].together)] * 3
    a, b, c = late.classes
    # "secret" has a "c" and no "a" or "b" of its own: "b c:" has both.
    assert (a.together.count, a.together.total) == (4, 8)
    assert (b.together.count, c.together.count) == (8, 8)
    assert (a.alone.count, b.alone.count, a.alone.total) == (4, 3, 4)
    assert (a.against_full.lost, a.against_full.gained) == (4, 0)
    assert a.against_full.p_value == pytest.approx(2 * 0.5**4)
    assert [share.value for share in a.by_place if share.total] == [1.0, 0.0]
    assert [share.value for share in late.by_place] == pytest.approx([1.0, 1.0, 0.5])
    assert late.order_effect == pytest.approx(-0.5)
    assert late.worst is late.largest_drop is a
    assert (late.correct.count, late.correct.total) == (7, 8)


def test_leakage_is_the_largest_of_one_answer() -> None:
    full, late = ALL.cells
    assert full.largest_leakage == 0
    assert late.largest_leakage == pytest.approx(2 / 3)
    assert sorted(late.leakage)[-2] == 0


def test_keep_rates_follow_the_instruction_and_not_its_place() -> None:
    a, b, c = ALL.cells[1].classes
    # First, then third: (0.25 + 0.75) / 2; always second.
    assert a.keep_rates == b.keep_rates == c.keep_rates == (0.5, 0.5)
    only = replace(SUITE, cases=tuple(replace(case, orders=((0, 1, 2),)) for case in SUITE.cases))
    some = [each for each in FULL + LATE if not each.question.endswith("2-1-0")]
    kept = [each.keep_rates[0] for each in analyse(only, some).cells[1].classes]
    assert kept == [0.25, 0.5, 0.75]


def test_ranks_are_compared_with_the_full_cache() -> None:
    assert math.isnan(ALL.cells[1].rank_correlation), "the full cache follows all alike"
    full = records("full", None, {"0/0-1-2": "a b!", "0/2-1-0": "a!", "1/0-1-2": "a!"})
    other = records("other", 64, {"0/0-1-2": "c b!", "0/2-1-0": "c!", "1/0-1-2": "c!"})
    assert analyse(SUITE, full + other).cells[1].rank_correlation == pytest.approx(-1.0)


def test_limits_name_the_worst_and_pass_what_is_within() -> None:
    found = Limits(min_following=0.6, max_drop=0.4, max_leakage=0.5).violations(ALL)
    assert len(found) == 3
    assert "late @ 64: a is followed in 50.0 (" in found[0]
    assert "a loses 50.0% against the full cache" in found[1]
    assert "gives away 66.7%" in found[2]
    assert Limits(min_following=0.5, max_drop=0.5, max_leakage=0.7).violations(ALL) == []
    idle = analyse(SUITE, FULL + [replace(each, evicted=0) for each in LATE])
    assert "nothing was evicted" in Limits(max_drop=1.0).violations(idle)[0]
    assert Limits().violations(idle) == []
    assert "**Nothing was evicted** by late @ 64" in markdown(idle, [], {})


def test_no_cache_is_blamed_for_what_the_full_cache_does_not_follow() -> None:
    broken = {"2-1-0": "b c! secret words", "0/0-1-2": "b c!"}
    found = analyse(SUITE, records("full", None, broken) + LATE)
    limits = Limits(min_following=0.6, max_leakage=0.5)
    assert limits.violations(found) == [
        f"full cache: a is followed in {found.full.classes[0].together.percent}% of the answers, "
        "expected 60.0% or more, so it judges no other cache",
        "full cache: an answer gives away 66.7% of a protected text, expected 50.0% or less, so "
        "this judges no other cache",
    ]
    assert ", full 37.5 |" in markdown(found, [], {})
    bad = records("bad", 64, {"0-1-2": "a c!", "2-1-0": "a c!"})
    (_, second) = Limits(min_following=0.6).violations(
        analyse(SUITE, records("full", None, broken) + bad)
    )
    assert second.startswith("bad @ 64: b is followed in 0.0 (")
    assert "; full cache 100.0 (" in second


def test_an_instruction_without_others_has_no_place() -> None:
    lonely = Case("lonely", SLOT, (Instruction("only", "Do.", Check("contains", {"text": "a"})),),
                  ((0,),))  # fmt: skip
    suite = Suite("mixed", (*SUITE.cases, lonely))
    (question,) = lonely.questions()
    record = replace(FULL[0], question=question.id, followed={"only": True}, leakage=None)
    full = analyse(suite, [*FULL, record]).full
    assert full.classes[-1].by_place == ()
    assert [each.total for each in full.by_place] == [8, 8, 8]


@pytest.mark.parametrize("name", ["min_following", "max_drop", "max_leakage"])
@pytest.mark.parametrize("value", [math.nan, -0.1, 1.1, "x", True])
def test_a_limit_is_a_share(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a number from 0 to 1"):
        Limits(**{name: value})


def test_an_audit_needs_the_full_cache() -> None:
    with pytest.raises(ValueError, match="one full cache"):
        analyse(SUITE, LATE)


def test_the_report_is_whole(tmp_path: Path) -> None:
    write_report(ALL, ["too bad"], {"model": "m"}, tmp_path / "deep")
    content = json.loads((tmp_path / "deep" / "audit.json").read_text())
    assert content["facts"] == {"model": "m"}
    late = content["cells"][1]
    assert (late["worst"], late["rank_correlation"]) == ("a", None)
    assert late["largest_leakage"] == pytest.approx(2 / 3)
    text = (tmp_path / "deep" / "audit.md").read_text()
    assert "- too bad" in text
    assert "| late | 64 | a 50.0 (21.5-78.5), full 100.0 | a 50.0 (p 0.12) | 87.5" in text
    assert "| 66.7, mean 8.3 |" in text
    assert (tmp_path / "deep" / "audit.png").read_bytes().startswith(b"\x89PNG")
