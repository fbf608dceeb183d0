"""The comparisons of caches, on few problems: what they write, and that a second run goes on."""

from __future__ import annotations

import pytest

from examples.research import compare_policies, compare_windows
from examples.research.tables import read_csv


def page(path, name):
    path.write_text(f"before\n<!-- {name} -->\n<!-- end {name} -->\nafter\n")
    return path


def test_policies_by_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_policies, "TASKS", ("chain",))
    document = page(tmp_path / "page.md", "policies-llama")
    common = ["--problems", "2", "--document", str(document), "--output", str(tmp_path)]
    wave = ["--only", "H2O (attention only) + wave"]
    compare_policies.main([*common, "--unprotected", "96", *wave])
    first = read_csv(tmp_path / "policies-llama.csv")
    assert [(row["budget"], row["prompt"], row["policy"]) for row in first] == [
        ("full", "kept", "full (DynamicCache)"),
        ("96", "evictable", "H2O (attention only) + wave"),
    ]
    assert float(first[1]["KiB/row"]) < 0.5 * float(first[0]["KiB/row"])
    compare_policies.main([*common, "--protected", "160", *wave])
    rows = read_csv(tmp_path / "policies-llama.csv")
    assert rows[:2] == first, "not run again"
    assert rows[2]["prompt"] == "kept"
    assert "| 160 | kept | H2O (attention only) + wave |" in document.read_text()
    assert f"3 lines in {tmp_path / 'policies-llama.csv'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"expected names among .* got \['nonsense'\]"):
        compare_policies.main([*common, "--unprotected", "96", "--only", "nonsense"])


def test_windows_beside_a_threshold(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_windows, "RATIOS", (0.3,))
    monkeypatch.setattr(compare_windows, "THRESHOLDS", {"random": (147,)})
    kara = compare_windows.windows("llama")["bidirectional, chunks + wave"]
    monkeypatch.setattr(compare_windows, "windows", lambda family: {"kara": kara})
    document = page(tmp_path / "page.md", "windows-llama")
    common = ["--document", str(document), "--output", str(tmp_path)]
    compare_windows.main(["--problems", "2", *common])
    rows = read_csv(tmp_path / "windows-llama.csv")
    assert [(row["ratio"], row["cache"]) for row in rows] == [
        *(("0.3", "kara"), ("0.3", "random, budget 147"), ("1", "full (DynamicCache)"))
    ]
    held = [float(row["held"]) for row in rows]
    assert held[0] == pytest.approx(held[1], rel=0.05), "the budget is chosen to that end"
    assert held[1] < 0.85 * held[2]
    assert "| 0.3 | kara |" in document.read_text()
