"""`generate`: answers are those of the model alone, whatever the batches; the bound holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.tiny_reasoner import DEVELOPMENT_SEEDS, MODELS, make_problems
from examples.tiny_reasoner.evaluate import load
from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.cli.generate import generate_command
from hf_reasoncache.cli.options import Dtype
from hf_reasoncache.generation import worker
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import SnapKV

NEW = 24
SMALL = {"window": 16, "buffer": 16, "max_new_tokens": NEW, "threads": 1}
SMALL |= {"dtype": Dtype.float32, "device": "cpu"}
SNAPKV = {"cache": "snapkv:prompt=evict", "budget": "48"}


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    return load(MODELS["llama"])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts of several lengths; the third may write less, the last one has no id."""
    problems = [
        each
        for task in ("chain", "walk", "instr")
        for each in make_problems(task, 2, DEVELOPMENT_SEEDS[800], "llama")
    ]
    rows = [{"id": f"p{n}", "prompt": each.prompt, "n": n} for n, each in enumerate(problems)]
    rows[2]["max_new_tokens"] = 7
    del rows[5]["id"]
    return write(tmp_path_factory.mktemp("prompts") / "p.jsonl", rows)


@pytest.fixture
def generate(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the generator in this process: the answers, and what it printed."""

    def call(name: str = "out", **options: Any) -> tuple[list[dict[str, Any]], str]:
        out = tmp_path / f"{name}.jsonl"
        arguments = {"model": str(MODELS["llama"]), "prompts": prompts, "memory": "100MB"}
        generate_command(**arguments | {"out": out} | SMALL | options)
        return [json.loads(line) for line in out.read_text().splitlines()], capsys.readouterr().out

    return call


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def about(tmp_path: Path, name: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / f"{name}.jsonl.meta.json").read_text())
    return found


def alone(loaded, prompt: str, new: int, cache: Callable[[Any], Any] | None) -> str:
    """What `generate` answers to one prompt."""
    model, tokenizer = loaded
    model.set_attn_implementation("reasoncache" if cache else "sdpa")
    inputs = tokenizer(prompt, return_tensors="pt")
    given = cache_kwarg(cache(model.config)) if cache else {}
    output = model.generate(**inputs, do_sample=False, max_new_tokens=new, **given)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]).removesuffix("<eos>").strip()


@pytest.mark.parametrize("options", [{}, SNAPKV], ids=["full", "snapkv"])
def test_greedy_answers_are_those_of_each_prompt_alone(
    generate, loaded, prompts: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    answers, printed = generate(**options)
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert [(each["id"], each["n"]) for each in answers] == [
        *((f"p{n}", n) for n in range(5)),
        ("6", 5),
    ]
    snapkv = {"scorer": SnapKV(queries=16), "window": 16, "buffer": 16, "protect": False}

    def make(config: Any) -> ReasonAllocCache:
        return ReasonAllocCache(config, budget=48, head_budgets=False, **snapkv)

    for row, answer in zip(rows, answers, strict=True):
        new = row.get("max_new_tokens", NEW)
        assert answer["text"] == alone(loaded, row["prompt"], new, make if options else None)
        assert answer["prompt"] == row["prompt"]
        assert (answer["completion_tokens"], answer["finish_reason"]) == (new, "length")
    # One batch of all, or the longest prompts alone first: the same answers, in the same order.
    small, _ = generate("small", memory="1MB", look_ahead=4, **options)
    assert small == answers
    first, second = about(tmp_path)["last_run"], about(tmp_path, "small")["last_run"]
    assert (first["batches"], first["answers"], first["tokens"]) == (1, 6, 5 * NEW + 7)
    assert second["batches"] > 1
    assert second["peak_bytes"] <= 1_000_000


def test_samples_come_from_streams_of_their_own(generate, tmp_path: Path) -> None:
    options = {"samples": 3, "temperature": 1.5, "token_ids": True}
    answers, _ = generate(**options)
    assert [(each["id"], each["sample"]) for each in answers[:4]] == [
        *(("p0", n) for n in range(3)),
        ("p1", 0),
    ]
    assert len({each["text"] for each in answers}) > 12, "short ones may be alike"
    assert all(len(each["token_ids"]) == each["completion_tokens"] for each in answers)
    for name, changes in (("cap", {"batch_size": 2}), ("small", {"memory": "0.9MB"})):
        assert generate(name, **options | changes)[0] == answers
        assert about(tmp_path, name)["last_run"]["batches"] >= 6
    assert about(tmp_path, "small")["last_run"]["peak_bytes"] <= 900_000
    fewer, _ = generate("fewer", **options | {"samples": 2, "limit": 2})
    assert fewer == [each for each in answers[:6] if each["sample"] < 2]
    other, _ = generate("other", **options | {"samples": 2, "seed": 1, "limit": 2})
    assert {each["text"] for each in fewer}.isdisjoint(each["text"] for each in other)


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "rkv", "budget": "176"},
        {"cache": "h2o:prompt=evict", "budget": "48"},
        {"cache": "sliding-window:window=24", "budget": "0.5"},
    ],
    ids=lambda options: options["cache"],
)
def test_the_bound_holds_where_prompts_are_shared_and_where_not(
    generate, tmp_path: Path, options: dict[str, str]
) -> None:
    answers, _ = generate(samples=2, temperature=1.0, memory="3MB", **options)
    found = about(tmp_path)
    assert found["shared_prompts"] == ("evict" not in options["cache"])
    assert 0.4 * 3e6 < found["last_run"]["peak_bytes"] <= 3e6
    assert generate("one", samples=2, temperature=1.0, batch_size=1, **options)[0] == answers


def test_lines_have_settings_of_their_own(generate, prompts: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in prompts.read_text().splitlines()][:3]
    rows[1] |= {"temperature": 1.5, "seed": 5, "id": 17}
    rows[2] |= {"temperature": 1.5, "top_k": 1}
    answers, _ = generate(prompts=write(tmp_path / "q.jsonl", rows))
    greedy, _ = generate("greedy", limit=3)
    assert [a["text"] == b["text"] for a, b in zip(answers, greedy, strict=True)] == [
        *(True, False, True)
    ]
    assert [(each["id"], each["seed"]) for each in answers] == [("p0", 0), (17, 5), ("p2", 0)]


def test_a_run_that_was_killed_goes_on_with_other_limits(
    generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = generate("whole", temperature=1.5)
    calls, made = [], worker.Worker.run

    def dies(self, batch, progress):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(batch))
        return made(self, batch, progress)

    with monkeypatch.context() as patch:
        patch.setattr(worker.Worker, "run", dies)
        with pytest.raises(KeyboardInterrupt):
            generate(temperature=1.5, batch_size=1)
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-9])
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(ValueError, match=r"differs in seed \(0 there, 1 now\);"):
        generate(temperature=1.5, seed=1)
    answers, printed = generate(temperature=1.5)
    assert answers == whole
    assert printed.startswith("4 answers, "), "two were whole, the third had lost its end"
    assert not partial.exists()
    assert "complete already" in generate(temperature=1.5)[1]
    with pytest.raises(ValueError, match=r"got others, which differ in .*budget \(None there"):
        generate(**SNAPKV)


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        (['{"prompt": "a"}', "{"], {}, r"p.jsonl:2: expected a JSON object"),
        (['{"prompt": " "}'], {}, r"p.jsonl:1: expected 'prompt' as text"),
        ([], {}, "expected JSON lines, got none"),
        (
            ['{"id": 1, "prompt": "a"}', '{"id": "1", "prompt": "b"}'],
            {},
            "p.jsonl:2: .* '1', which",
        ),
        (['{"prompt": "a", "text": ""}'], {}, "p.jsonl:1: expected no field of the names .* text"),
        (['{"prompt": "a", "temperature": -1}'], {}, "p.jsonl:1: temperature: expected 0 to 10"),
        (
            ['{"prompt": "a", "max_new_tokens": 10000001}'],
            {},
            "new_tokens: expected at most 10,",
        ),
        (['{"prompt": "a", "seed": 1.5}'], {}, "'seed' as an integer"),
        (['{"prompt": "a"}'], {"memory": "9KB"}, r"p.jsonl:1: .* 24 tokens .* 9,000 bytes, got 1"),
        (['{"prompt": "a"}'], {"memory": "much"}, "memory: expected an amount such as"),
        (['{"prompt": "a"}'], {"samples": 2}, "greedy answers to a prompt are all alike"),
        (['{"prompt": "a"}'], {"cache": "rkv"}, "--budget: expected one for rkv, got None"),
        (['{"prompt": "a"}'], {"budget": "64"}, "--budget: expected none with the full cache"),
        (['{"prompt": "a"}'], {"budget": "64", "cache": "x"}, "--cache: expected one of full"),
        (
            [json.dumps({"prompt": "a " * 60})],
            {"cache": "rkv", "budget": "64"},
            "p.jsonl:1: budget too small",
        ),
        (['{"prompt": "a"}'], SNAPKV | {"cache": "snapkv:protect"}, "lines with 'spans'"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    generate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[str],
    options: dict[str, Any],
    match: str,
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(row + "\n" for row in rows))
    monkeypatch.setattr(worker.Worker, "run", None)
    with pytest.raises(ValueError, match=match):
        generate(prompts=path, **options)
    assert [each.name for each in tmp_path.iterdir()] == ["p.jsonl"]


def test_spans_are_protected(generate, prompts: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in prompts.read_text().splitlines()][2:4]
    for row in rows:
        row["spans"] = [row["prompt"].split(" . ")[0]]
    path = write(tmp_path / "q.jsonl", rows)
    options = {"budget": "48", "prompts": path, "samples": 2, "temperature": 1.0}
    kept, _ = generate(cache="random:protect", **options)
    lost, _ = generate("lost", cache="random:prompt=evict", **options)
    assert [each["text"] for each in kept] != [each["text"] for each in lost]


def test_the_command_answers_or_says_why_not_in_a_line(run, prompts: Path, tmp_path: Path) -> None:
    status, out, _ = run("generate", "--help")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    assert len(out.split("Options:")[0].split()) > 40, "what it does"
    arguments = ["generate", MODELS["llama"], "--prompts", prompts, "--out", tmp_path / "a.jsonl"]
    arguments += ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", 4, "--memory"]
    status, out, _ = run(*arguments, "100MB")
    assert status == 0
    assert out.startswith("6 answers, 27 tokens in "), "the third may write 7"
    assert about(tmp_path, "a")["machine"]["threads"] >= 1
    for option in ("--samples", "--max-new-tokens"):
        status, out, error = run(*arguments, "1GB", option, 10**11)
        assert (status, out) == (2, "") and f"for '{option}'" in error
    status, out, error = run(*arguments, "much")
    assert (status, out) == (1, "")
    assert error.startswith("error: --memory: expected an amount such as")
    assert error.count("\n") <= 1
