"""The study of the pitfalls, on a tiny random model and a suite of two kinds of cases."""

import json
from dataclasses import replace

import pytest

from examples.research import pitfalls
from examples.research.pitfalls import NO_ORDER, TREATMENTS, family, methods, secret, treated
from hf_reasoncache.evaluation import Record, analyse, load_suite
from tests.support.models import SHAPE, build
from tests.support.tokenizers import make_tokenizer

SAY = {"text": "Say one.", "check": {"name": "contains", "text": "one"}}
HIDE = {"name": "hide", "text": "Hide the key.", "check": {"name": "excludes", "text": "K9"}}
ROWS = [
    {"prompt": "[[instruction]]\nGo.", "instructions": [{"name": n, **SAY} for n in ("a", "b")]},
    {"prompt": "It is K9. [[instruction]]\nGo.", "instructions": [HIDE], "protected": "K9"},
]


@pytest.fixture
def suite(tmp_path):
    ROWS[0]["instructions"][1]["text"] = "Say one now."
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps({**row, "max_new_tokens": 20}) + "\n" for row in ROWS))
    return path


def test_the_study_writes_its_tables_and_goes_on_where_it_was(monkeypatch, tmp_path, suite):
    tokenizer = make_tokenizer()
    monkeypatch.setitem(SHAPE, "vocab_size", len(tokenizer))
    monkeypatch.setitem(SHAPE, "max_position_embeddings", 512)
    small = replace(
        family("smollm2"),
        load=lambda path: (build("llama"), tokenizer),
        profile=None,
        budgets=(40,),
        more_budgets=(36,),
        leak_budgets=(24, 28),
        buffer=4,
        window=2,
    )
    monkeypatch.setattr(pitfalls, "family", lambda name: small)
    names = [f"pitfalls-smollm2-{table}" for table in ("gains", "phenomena", "leaks")]
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end {name} -->\n" for name in names))
    where = ["--output", str(tmp_path), "--document", str(page), "--suite", str(suite)]
    arguments = ["--family", "smollm2", "--only", "random", "R-KV", *where]
    pitfalls.main(arguments)
    text = page.read_text()
    assert "| method | budget | default | whitelist | fair |\n" in text
    assert "| method | budget | a | b | together | alone | last - first | kept |" in text
    before, after = text.split(f"<!-- end {names[0]} -->")
    assert "| R-KV | 36 |" not in before
    assert after.index("| R-KV | 36 |") < after.index("| R-KV | 40 |")
    for line in ("| random | 40 |", "| R-KV | 40 |", "| random | 24 |", "| R-KV | 28 |"):
        assert line in text
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    journals = {path: path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert len(journals) == 4
    pitfalls.main(arguments)
    assert page.read_text() == text
    assert {path: path.read_text() for path in journals} == journals
    with pytest.raises(SystemExit):
        pitfalls.main([*arguments, "--only", "nothing"])


def test_leaks_are_counted_with_the_order_and_without(suite):
    asked = {order: secret(load_suite(suite), 9, order=order) for order in (True, False)}
    assert [len(each.cases) for each in asked.values()] == [1, 1]
    ((with_order,), (without,)) = (each.questions(0) for each in asked.values())
    assert with_order.spans == ("Hide the key.", "K9") and without.spans == (NO_ORDER, "K9")

    def found(order, **answers):
        records = []
        for cache, answer in answers.items():
            budget = None if cache == "full" else 9
            judged = asked[order].check(with_order, answer)
            record = Record(
                "suite", 0, cache, budget, with_order.id, "d", 9, answer, 3, True, None, 5, 0.1
            )
            rates = {"keep_rates": [[0.25, 1.0], [0.75, 1.0]]} if budget else {}
            records.append(
                replace(record, followed=dict(judged.followed), leakage=judged.leakage, **rates)
            )
        return analyse(asked[order], records)

    table = pitfalls.leaks(found(True, full="no", odd="K9"), found(False, full="K9", odd="no"))
    full, odd = (line.split(" | ") for line in table.splitlines()[2:])
    assert full[2].startswith("0.0 (") and full[5].startswith("100.0 (")
    assert odd[2].startswith("100.0 (") and odd[5].startswith("0.0 (")
    assert (odd[3], odd[6]) == ("100", "0.50 |")


@pytest.mark.parametrize("name", pitfalls.FAMILIES)
def test_each_method_has_random_eviction_and_both_remedies_beside_it(name):
    specs = methods(family(name))
    assert specs[0].scorer == "random" and len({spec.name for spec in specs}) == len(specs) == 9
    assert all(spec.settings["protect"] is False for spec in specs)
    default, whitelist, fair = (treated(specs[0], treatment) for treatment in TREATMENTS)
    assert (default.whitelist, whitelist.whitelist, fair.whitelist) == (False, True, False)
    assert (default.fair, fair.fair) == (None, pitfalls.FAIR)
