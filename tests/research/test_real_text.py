"""The studies on real text, on a tiny random model instead of the pretrained one."""

import csv
from dataclasses import replace

import pytest
import torch

from examples.research import head_budgets, real_windows
from hf_reasoncache.evaluation.fidelity import forwards
from hf_reasoncache.geometry import Geometry
from tests.support.models import HEADS, VOCABULARY, build
from tests.support.profiles import make_profile
from tests.support.tokenizers import Letters


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(module, name, *arguments, **settings):
        for each, value in settings.items():
            monkeypatch.setattr(module, each, value)
        monkeypatch.setattr(module, "load", lambda dtype, folder: (build("llama"), Letters()))
        page = tmp_path / "page.md"
        page.write_text(f"<!-- {name} -->\n<!-- end {name} -->\n")
        where = ["--output", str(tmp_path), "--document", str(page)]
        module.main([*arguments, *where, "--threads", "1"])
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_forms_of_head_budgets_spend_the_same(monkeypatch):
    monkeypatch.setattr(head_budgets, "WINDOW", 4)
    monkeypatch.setattr(head_budgets, "BUFFER", 8)
    model = build("llama")
    ids = torch.randint(3, VOCABULARY, (2, 96), generator=torch.Generator().manual_seed(0))
    spread = {}
    for form in head_budgets.FORMS:
        made = head_budgets.cache(model.config, form, "rkv", 24)
        assert len(list(forwards(model, ids, made))) == 12
        for layer in made.own_layers:
            assert layer.state.heads.sum(-1).tolist() == [24 * HEADS] * 2
            assert layer.state.heads.shape == (2, HEADS) and layer.evictions > 0
        spread[form] = head_budgets.spread(made)
    assert spread["equal"] == 0 < spread["attention"]


def test_heads_have_fixed_shares_by_a_profile(monkeypatch, tmp_path):
    monkeypatch.setattr(head_budgets, "WINDOW", 4)
    monkeypatch.setattr(head_budgets, "BUFFER", 8)
    model = build("llama")
    shape = {"geometry": Geometry.of(model.config), "demand": (1.0,) * 3, "statistics": {}}
    by_head = ((1.0, 4.0), (1.0, 1.0), (9.0, 1.0))
    made = make_profile(**shape, standard_error=(0.0,) * 3, head_demand=by_head)
    made.save_pretrained(tmp_path / "heads")
    cache = head_budgets.cache(model.config, str(tmp_path / "heads"), "rkv", 24)
    assert len(list(forwards(model, torch.full((2, 96), 7), cache))) == 12
    # In proportion to the root of the demand.
    found = [layer.state.heads.tolist() for layer in cache.own_layers]
    assert found == [[[16, 32]] * 2, [[24, 24]] * 2, [[36, 12]] * 2]
    replace(made, head_demand=None).save_pretrained(tmp_path / "none")
    with pytest.raises(SystemExit, match="expected a profile with a demand for each head"):
        head_budgets.cache(model.config, str(tmp_path / "none"), "rkv", 24)


def test_head_budgets_table(run):
    shape = {"TOKENS": 96, "WINDOW": 4, "BUFFER": 8}
    rows = run(head_budgets, "head-budgets", "--budgets", "24", **shape)
    found = {(row["scorer"], row["heads"]): row for row in rows}
    assert len(rows) == len(found) == 3 * len(head_budgets.FORMS)
    assert found["rkv", "equal"]["loss against equal"] == ""
    assert float(found["rkv", "attention"]["differ by"]) > 0
    assert float(found["random", "equal"]["KL"]) > 0


def test_windows_table(run):
    rows = run(
        real_windows, "real-windows", "--ratios", "0.3", TOKENS=320, PROFILE={"profile": [1, 2, 1]}
    )
    found = {row["cache"]: row for row in rows}
    assert len(found) == 9 and found["full"]["bytes of full"] == "100%"
    for name, row in list(found.items())[1:]:
        share = int(row["bytes of full"].rstrip("%"))
        assert (row["below full from"] == "-") == (share >= 100), name
        assert (row["loss against random"] == "") == name.endswith("random")
    assert int(found["windows"]["held"]) < 320
