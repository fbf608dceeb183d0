"""`plan` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_reasoncache import BudgetProfile, ReasonAllocCache
from hf_reasoncache.planning import row_bytes
from tests.support.models import llama_8b

TINY = Path(__file__).parents[2] / "examples/tiny_reasoner"
LINES = ("DynamicCache", "no budget", "reason-alloc 1024")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A config and nothing else."""
    config = llama_8b()
    config.dtype = torch.bfloat16
    config.max_position_embeddings = 65536
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "8B")
    return tmp_path / "8B"


def test_a_plan(run, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out_dir = tmp_path / "new" / "plan"
    arguments = ("--memory", "80GB", "--context", 32768, "--budget", 1024, "--batch", "1,16")
    status, out, err = run("plan", model, *arguments, "--out", out_dir)
    assert (status, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines() if str(tmp_path) not in line)
    assert "8B: 8,030 million parameters, bfloat16" in out
    assert "memory 80.00 GB - weights 16.06 GB - reserve 4.00 GB (5%)" in out
    assert "Everything below is computed: ceilings, not measurements." in out
    assert "NOTE" not in out

    written = (out_dir / "plan.json").read_text()
    assert run("plan", model, *arguments, "--json") == (0, written, "")
    facts = {each["cache"]: each for each in json.loads(written)}
    assert tuple(facts) == LINES
    full, exact, small = facts.values()
    assert full["bytes_per_row"] == 32767 * 131072
    planned = row_bytes(
        ReasonAllocCache(llama_8b(), budget=1024),
        llama_8b(),
        prompt=256,
        generated=32511,
        dtype=torch.bfloat16,
    )
    assert small["bytes"] == vars(planned)
    assert 20 * full["rows"] < small["rows"] < 30 * full["rows"]
    assert small["at_batch"]["16"] / small["at_batch"]["1"] > 13
    assert full["at_batch"]["16"] is None, "16 rows of 32k do not fit"
    assert full["tokens_per_second"] < exact["tokens_per_second"] < small["tokens_per_second"]
    for line in LINES:
        assert f"{facts[line]['bytes_per_row'] / 1e6:,.1f}" in out
        assert f"{facts[line]['mean_tokens_per_second']:,.0f}" in out
        assert f"| {line} |" in (out_dir / "plan.md").read_text()
    assert (out_dir / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_branches_and_several_caches(run, model: Path) -> None:
    arguments = ("--memory", "80GiB", "--gpu", "a100-80gb", "--context", 70000, "--branches", 4)
    status, out, _ = run(
        "plan", model, *arguments, "--cache", "snapkv", "--budget", "1024,0.1", "--prompt", 500,
    )  # fmt: skip
    assert status == 0 and "\nsnapkv 0.1 " in out and "\nshared, snapkv 0.1 " in out
    status, out, err = run(
        "plan", model, *arguments, "--cache", "snapkv", "--cache", "sliding-window", "--budget",
        1024, "--prompt", 500,
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "memory 85.90 GB" in out and "4 branches per prompt" in out
    assert "A100-80GB: 2.039 TB/s, 312 TFLOP/s" in out
    assert "NOTE: the model's config allows 65,536 positions only." in out
    for name in ("snapkv 1024", "sliding-window 1024", "no budget"):
        assert f"\n{name} " in out and f"\nshared, {name} " in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_profile_is_respected(run, tmp_path: Path) -> None:
    """One that gives layers different budgets has the same mean, hence the same bytes."""
    wave = TINY / "llama" / "tuned"
    tiny = ("plan", TINY / "llama", "--memory", "10MB", "--context", 400, "--prompt", 60)
    moving = ("--cache", "reason-alloc:heads=on")
    facts = []
    for number, extra in enumerate(((), ("--profile", wave))):
        place = tmp_path / str(number)
        assert run(*tiny, *moving, "--budget", 96, "--out", place, *extra)[0] == 0
        facts.append(json.loads((place / "plan.json").read_text())[-1])
    assert facts[0]["bytes"]["own"] == facts[1]["bytes"]["own"]
    # The layer that moves is larger.
    largest = max(BudgetProfile.from_pretrained(wave).layer_budgets(96, floor=68))
    assert facts[1]["bytes"]["moving"] / facts[0]["bytes"]["moving"] == pytest.approx(
        (largest + 128) / (96 + 128), rel=0.05
    )


def test_given_limits(run, model: Path) -> None:
    arguments = ("plan", model, "--memory", "80GB", "--context", 4096, "--budget", 1024)
    _, slow, _ = run(*arguments, "--bandwidth", 1000, "--flops", 100)
    assert "1 TB/s, 100 TFLOP/s,\n  from --flops" in slow
    _, quantised, _ = run(*arguments, "--weights", "5GB")
    assert "weights 5.00 GB" in quantised


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", 1024, "--memory", "16GB"], "memory: expected more than 16.86 GB"),
        (["--budget", 1024, "--memory", "lots"], "memory: expected an amount such as 80GB"),
        (["--budget", 4096], "--budget: expected less than the context of 4096, got 4096"),
        (["--budget", ","], "--budget: expected at least one number"),
        (["--budget", 200], "budget too small: expected budget >= 264"),
        (["--budget", 1024, "--prompt", 4096], "prompt: expected from 1 to 4095 tokens"),
        (["--budget", 1024, "--gpu", "H300"], "gpu: expected one of A100-40GB"),
        (["--budget", 1024, "--cache", "full:x"], "--cache: expected one of"),
        (["--budget", 1024, "--batch", "0.5"], "--batch: expected whole numbers"),
        (
            ["--budget", 1024, "--profile", TINY / "llama" / "tuned"],
            "profile: expected a model with the geometry of llama, got full_attention_layers",
        ),
    ],
)
def test_errors_are_one_line(run, model: Path, arguments: list[object], message: str) -> None:
    status, _, err = run("plan", model, "--context", 4096, *arguments)
    assert status == 1
    assert err.startswith("error: ") and message in err and "\n" not in err.strip()


def test_a_model_that_is_not_there(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, _, err = run("plan", "no/such-model", "--context", 4096, "--budget", 1024)
    assert status == 1 and err.startswith("error: ") and "Traceback" not in err


def test_the_full_cache_is_no_policy(run, model: Path) -> None:
    """It has a line of its own already."""
    status, _, err = run("plan", model, "--context", 4096, "--budget", 1024, "--cache", "full")
    assert status == 1 and "--cache: expected a compressed cache, got 'full'" in err
