"""Fits of measured times, and predictions of real runs under a clock that is known."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel

from examples.research.fleet.caches import specs
from examples.research.fleet.measure import measure
from examples.research.fleet.measured import (
    COLUMNS,
    Measured,
    Sample,
    read_measured,
    write_measured,
)
from examples.research.fleet.validate import validate
from examples.research.tables import read_csv
from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, make_problems
from hf_reasoncache.cli.options import Dtype

STEP, PROMPT = (0.002, 0.0003, 1e-9), (0.004, 2e-5, 3e-8)


def samples(noise: float = 0.0) -> list[Sample]:
    generator = np.random.default_rng(0)
    found = []
    for rows, moved in itertools.product((1, 4, 16), (1e4, 1e5, 1e6)):
        seconds = np.dot(STEP, (1, rows, rows * moved)) * generator.normal(1, noise)
        found.append(Sample("a", "step", rows, 1, rows * moved, float(seconds)))
    for rows, tokens in itertools.product((1, 4, 16), (20, 80, 200)):
        pairs = rows * tokens * (tokens + 1) / 2
        seconds = np.dot(PROMPT, (1, rows * tokens, pairs)) * generator.normal(1, noise)
        found.append(Sample("a", "prompt", rows, tokens, 0.0, float(seconds)))
    return found


def test_a_fit_finds_what_made_the_times(tmp_path: Path) -> None:
    exact = Measured.fit(samples())
    assert exact.of_step == pytest.approx(STEP, rel=1e-6)
    assert exact.of_prompt == pytest.approx(PROMPT, rel=1e-6)
    noisy = Measured.fit(samples(noise=0.03))
    assert noisy.step(8, 8e5, 0.0) == pytest.approx(np.dot(STEP, (1, 8, 8e5)), rel=0.05)
    assert noisy.prompts(100, 8) == pytest.approx(exact.prompts(100, 8), rel=0.05)
    # Times that are often half as long and seldom three times: the mean is what adds up.
    generator = np.random.default_rng(1)
    rough = [
        replace(each, seconds=each.seconds * factor)
        for each in samples() * 200
        for factor in [3.0 if generator.random() < 0.2 else 0.5]
    ]
    assert Measured.fit(rough).step(4, 4e5, 0.0) == pytest.approx(exact.step(4, 4e5, 0.0), rel=0.05)
    write_measured(tmp_path / "t.csv", samples())
    assert read_measured(tmp_path / "t.csv") == {"a": exact}


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least 3 measured times of a step, got 2"):
        Measured.fit(samples()[:2])
    (tmp_path / "t.csv").write_text(",".join(COLUMNS) + "\na,step,x,1,2,3\n")
    with pytest.raises(ValueError, match=r"t.csv:2: expected the columns cache, kind, rows"):
        read_measured(tmp_path / "t.csv")


def test_the_caches_that_are_compared() -> None:
    found = specs("snapkv:heads=on", "96, 128")
    assert list(found) == ["DynamicCache", "snapkv 96", "snapkv 128"]
    assert [budget for _, budget in found.values()] == [None, 96, 128]
    with pytest.raises(ValueError, match="--cache: expected a compressed cache, got 'full'"):
        specs("full", "96")


@pytest.fixture
def forwards() -> Iterator[list[None]]:
    """An entry for every forward of a model."""
    found: list[None] = []

    def note(module: Any, *_: Any) -> None:
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            found.append(None)

    hook = register_module_forward_hook(note)
    yield found
    hook.remove()


def test_a_prediction_counts_the_forwards_of_a_run(
    tmp_path: Path,
    forwards: list[None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every forward takes a second: then the prediction is exact, whatever the batches, and a
    table of two caches, whose rows leave one by one, has the right number of steps.
    """
    model, files = MODELS["llama"], []
    for name, seed, count in (("measured", 700, 2), ("other", 720, 4)):
        problems = [
            each
            for task in ("chain", "walk")
            for each in make_problems(task, count, DEVELOPMENT_SEEDS[seed], "llama")
        ]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"prompt": p.prompt}) + "\n" for p in problems))
    monkeypatch.setattr(time, "process_time", lambda: float(len(forwards)))
    table, out = tmp_path / "steps.csv", tmp_path / "compared.csv"
    common = {"model": str(model), "budget": "128", "cache": "snapkv", "wall": False}
    common |= {"max_new_tokens": 40, "dtype": Dtype.float32, "threads": 1}
    measure(prompts=files[0], out=table, rows="1,2,4", **common)
    for fit in read_measured(table).values():
        assert fit.of_step == pytest.approx((1, 0, 0), abs=1e-6)
        assert fit.step(5, 1e6, 0.0) == pytest.approx(1) == fit.prompts(50, 3)
    given = common | {"rows": "1,2,4"}
    validate(prompts=files[1], measured=files[0], memory="1.5MB", out=out, **given)
    lines = read_csv(out)
    assert [line["cache"] for line in lines] == ["DynamicCache", "snapkv 128"]
    for line in lines:
        assert int(line["answers"]) == 8 and int(line["batches"]) > 1
        # Batches of up to 40 forwards each, the last one ending at the longest answer.
        assert float(line["measured s"]) == float(line["predicted s"]) <= 40 * int(line["batches"])
        assert line["error"] in ("+0.0%", "-0.0%")
        assert 0 < int(line["memory"].rstrip("%")) <= 100
    printed = capsys.readouterr().out
    assert "CPU time of one process, 1 threads" in printed
    for rows, message in (("1,x", "--rows: expected whole numbers"), ("9", "at least 9 prompts")):
        with pytest.raises(ValueError, match=message):
            measure(prompts=files[0], out=table, rows=rows, **common)
