"""The tables of latents in 8 bits, in small."""

import csv

import pytest

from examples.benchmarks.latents import LatentShape
from examples.research import fp8_latents


def test_both_tables_are_written(monkeypatch, tmp_path):
    monkeypatch.setattr(fp8_latents, "SHAPE", LatentShape(layers=2, hidden=64, intermediate=64))
    monkeypatch.setattr(fp8_latents, "LENGTH", 24)
    monkeypatch.setattr(fp8_latents, "TOKENS", 64)
    monkeypatch.setattr(fp8_latents, "SEEDS", 2)
    names = ("fp8-latents", "fp8-latents-model")
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end {name} -->\n" for name in names))
    fp8_latents.main(["--output", str(tmp_path), "--document", str(page)])
    ways, model = (
        list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines())) for name in names
    )
    assert len(ways) == len(fp8_latents.LARGER) and page.read_text().count("\n| ") == 9
    plain, codes = model
    assert (plain["bytes of a token"], codes["bytes of a token"]) == ("1152", "578")
    assert float(plain["KL"]) < float(codes["KL"])


def test_the_ways_differ_where_they_should():
    """Rotary numbers so large that one scale leaves nothing of the latents."""
    one, two, kept = fp8_latents.errors(1e6, 0)
    assert one > 0.5 > two > kept
    assert fp8_latents.errors(1, 0) == pytest.approx([two, two, kept], rel=0.3)
