"""The table of keys and values in 8 bits, on a tiny random model instead of the pretrained one."""

import csv

import torch

from examples.research import fp8
from tests.support.models import VOCABULARY, build
from tests.support.tokenizers import Letters


def test_every_cache_has_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(fp8, "load", lambda dtype, folder: (build("llama"), Letters()))
    monkeypatch.setattr(fp8, "TOKENS", 96)
    monkeypatch.setattr(fp8, "COMMON", fp8.COMMON | {"buffer": 8, "window": 4})
    # The shipped profile is of another geometry.
    monkeypatch.setattr(fp8, "PROFILE", None)
    page = tmp_path / "page.md"
    page.write_text("<!-- fp8 -->\n<!-- end fp8 -->\n")
    fp8.main(["--budgets", "24", "--output", str(tmp_path), "--document", str(page)])
    with (tmp_path / "fp8.csv").open(newline="") as file:
        rows = {row["cache"]: row for row in csv.DictReader(file)}
    assert len(rows) == 10 and page.read_text().count("\n| ") == 11
    assert rows["DynamicCache"]["same best token"] == "100.0%"
    assert float(rows["DynamicCache"]["KL"]) == 0
    full, ours = float(rows["DynamicCache"]["KiB"]), float(rows["ReasonAllocCache, fp8"]["KiB"])
    assert 0 < float(rows["ReasonAllocCache, fp8"]["KL"]) < float(rows["random, fp8"]["KL"])
    assert ours < full
    assert float(rows["R-KV, fp8"]["KiB"]) < float(rows["R-KV"]["KiB"])


def test_fidelity_is_what_torch_says():
    generator = torch.Generator().manual_seed(0)
    full, mine = (torch.randn(3, 2, 4, VOCABULARY, generator=generator) for _ in range(2))
    found = fp8.Fidelity(list(full))
    assert torch.equal(torch.stack(list(found.passed(mine))), mine)
    logs = (x[1:].log_softmax(-1).flatten(0, 2) for x in (mine, full))
    wanted = torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True)
    assert abs(found.divergence / found.tokens - float(wanted)) < 1e-5
    assert found.alike == int((mine[1:].argmax(-1) == full[1:].argmax(-1)).sum())
