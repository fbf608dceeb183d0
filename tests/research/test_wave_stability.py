"""The study of waves, on a tiny random model instead of the pretrained one."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.research import wave_stability
from hf_reasoncache.calibration.sensitivity import Eviction, Sensitivity
from hf_reasoncache.geometry import Geometry
from tests.support.models import build
from tests.support.profiles import make_profile
from tests.support.tokenizers import Letters


def test_every_wave_has_a_distance_and_every_text_a_gain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = build("llama")
    divergence = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    make_profile(
        geometry=Geometry.of(model.config),
        demand=(12.0, 30.0, 18.0),
        head_demand=None,
        calibration=replace(make_profile().calibration, prompts=("a" * 64,) * 4),
        statistics={"divergence": divergence},
    ).save_pretrained(tmp_path / "sensitivity")
    changes = {
        "load": lambda dtype, folder: (model, Letters()),
        "SENSITIVITY": tmp_path / "sensitivity",
        "ESTIMATOR": Sensitivity((8, 16), 12, Eviction(buffer=6, window=4)),
        "COMMON": wave_stability.COMMON | {"buffer": 8, "window": 4},
        "TOKENS": 96,
        "BUDGET": 24,
        "ANSWERS": 40,
        "LENGTHS": (20, 60),
    }
    for name, value in changes.items():
        monkeypatch.setattr(wave_stability, name, value)
    page = tmp_path / "page.md"
    page.write_text("<!-- wave_stability -->\n<!-- end wave_stability -->\n")
    given = ["--pages", "4", "--output", str(tmp_path), "--document", str(page)]
    wave_stability.main(given)
    with (tmp_path / "wave_stability.csv").open(newline="") as file:
        rows = {row["wave from"]: row for row in csv.DictReader(file)}
    assert set(rows) == {
        "answers (shipped)",
        *(f"answers, {half} half" for half in ("first", "second")),
        *(f"pages, {n} tokens" for n in (20, 60)),
        *(f"pages, {n} tokens, {half} half" for n in (20, 60) for half in ("first", "second")),
    }
    assert float(rows["answers (shipped)"]["distance to the shipped"]) == 0
    for name, row in rows.items():
        assert (row["to the second half"] != "") == ("first" in name)
        assert (row["loss against equal layers"] == "") == ("pages" in name and "half" in name)
    assert len({row["loss against equal layers"] for row in rows.values()}) > 3
    assert "| pages, 20 tokens |" in page.read_text()
