"""`show`, `compare`, `push` and `pull` as a user meets them: output, errors, exit status."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import hf_reasoncache_cli
from hf_reasoncache import BudgetProfile
from hf_reasoncache.profiles.distance import wave_distance
from hf_reasoncache.profiles.hub import answers
from hf_reasoncache.profiles.loading import shipped
from tests.support.hub_server import TOKEN, Hub, connected_hub, running_hub
from tests.support.profiles import COMMIT, make_profile

PROFILE = make_profile()
OTHER = make_profile(estimator="sensitivity", demand=(5, 1, 1))


@pytest.fixture
def waves(tmp_path: Path) -> tuple[Path, Path]:
    PROFILE.save_pretrained(tmp_path / "one")
    OTHER.save_pretrained(tmp_path / "other")
    return tmp_path / "one", tmp_path / "other"


def test_show(run, waves) -> None:
    status, out, err = run("show", waves[0], "--budget", 100)
    assert (status, err) == (0, "")
    assert f"model      org/model at {COMMIT}" in out
    assert "3 full-attention layers, 2 KV heads of size 16" in out
    assert "2 prompts, 4,096 generated tokens, seed 7" in out
    table = [line.split() for line in out.split("\n\n")[1].splitlines()]
    assert table[0] == ["layer", "demand", "error", "of", "mean", "budget"]
    budgets = PROFILE.layer_budgets(100)
    assert [row[:5] for row in table[1:]] == [
        ["0", "0.3333", "0.1", "0.01", str(budgets[0])],
        ["1", "90", "2.5", "2.07", str(budgets[1])],
        ["2", "40", "0", "0.92", str(budgets[2])],
    ]
    assert [row[5:] for row in table[1:]] == [[], ["#" * 24], ["#" * 11]]
    assert all(len(line) <= 80 for line in out.splitlines())


def test_show_as_json(run, waves) -> None:
    status, out, _ = run("show", waves[0], "--json")
    found = json.loads(out)
    assert status == 0
    assert [row["demand"] for row in found["layers"]] == list(PROFILE.demand)
    assert [row["budget"] for row in found["layers"]] == [None] * 3
    stored = json.loads(PROFILE.to_files()["config.json"])
    del found["layers"], stored["statistics"]
    assert found == stored


def test_show_needs_no_statistics(run, waves) -> None:
    (waves[0] / "statistics.safetensors").unlink()
    assert run("show", waves[0])[0] == 0


def test_pictures(run, waves, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("show", waves[0], "--png", tmp_path / "one.png")[0] == 0
    assert run("compare", *waves, "--png", tmp_path / "two.png")[0] == 0
    for name in ("one.png", "two.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_compare(run, waves) -> None:
    distance = wave_distance(PROFILE.demand, OTHER.demand)
    status, out, _ = run("compare", *waves)
    assert status == 0
    assert f"[2] {waves[1]}: sensitivity, 3 layers" in out
    assert out.splitlines()[-1].split() == ["[2]", f"{distance:.4f}", "0.0000"]
    found = json.loads(run("compare", *waves, waves[0], "--json")[1])
    assert found["distances"][1] == [distance, 0, distance]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["show"],
        ["show", "x", "--budget", "0"],
        ["compare", "one"],
        ["push", "no-such-directory", "org/wave"],
        ["pull", "org/wave"],
    ],
)
def test_wrong_usage(run, arguments: list[str]) -> None:
    status, _, err = run(*arguments)
    assert status == 2 and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "no-such-profile"], "error: profile: expected a directory that exists"),
        (["show", "."], "error: config.json: expected this file of a profile, got none"),
        (["show", "broken"], "error: broken: demand: expected finite numbers >= 0, 3 of them"),
        (["compare", "one", "broken"], "error: broken: demand"),
        (["pull", "not-a-repository", "--out", "x"], "error: profile: expected"),
        (["show", "one", "--png", "no/such/dir.png"], "No such file or directory"),
    ],
)
def test_errors_are_one_line(
    run, waves, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(waves[0].parent)
    Path("broken").mkdir()
    config = json.loads((waves[0] / "config.json").read_text()) | {"demand": [1]}
    Path("broken/config.json").write_text(json.dumps(config))
    status, _, err = run(*arguments)
    assert status == 1
    assert err.startswith("error: ") and message in err and "\n" not in err.strip()


def test_the_command_is_installed_as_this_one() -> None:
    """Read from pyproject.toml: an editable install may be older than it."""
    settings = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    module, name = re.search(r'^hf-reasoncache = "([\w.]+):(\w+)"$', settings, re.M).groups()
    assert getattr(importlib.import_module(module), name) is hf_reasoncache_cli.main


def test_help(run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for name in ("calibrate", "show", "compare", "push", "pull"):
        assert f"  {name} " in out


# ----------------------------------------------- processes of their own, which take seconds each


SEVERAL = """
import sys
from hf_reasoncache.cli import main
for arguments in sys.argv[1:]:
    sys.argv[1:] = arguments.split()
    try:
        main()
    except SystemExit as ended:
        print("status", ended.code)
"""


def test_push_and_pull(waves, tmp_path: Path) -> None:
    """The Hub's client reads its environment when it is imported."""
    with running_hub() as hub:
        push_and_pull(hub, waves[0], tmp_path)


def push_and_pull(hub: Hub, profile: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    copy, nothing = tmp_path / "copy", tmp_path / "nothing"
    done = subprocess.run(
        [
            *(sys.executable, "-c", SEVERAL),
            f"push {profile} org/wave",
            f"pull org/wave --out {copy}",
            f"pull org/nothing --out {nothing}",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    stored = hub.files("org/wave")
    commit = f"{hub.url}/org/wave/commit/{hub.repos['org/wave'][-1][0]}"
    lines = done.stdout.splitlines()
    assert lines[:4] == [commit, "status 0", str(copy), "status 0"], done.stderr
    assert lines[4].startswith("status error: ") and "Repository Not Found" in done.stdout
    assert {path.name for path in copy.iterdir()} == {"config.json", "statistics.safetensors"}
    assert all(path.read_bytes() == stored[path.name] for path in copy.iterdir())
    assert not nothing.exists()

    hub.requests.clear()
    offline = subprocess.run(
        [sys.executable, "-m", "hf_reasoncache", "show", "org/wave"],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert offline.returncode == 0 and "org/model" in offline.stdout
    assert hub.requests == []


@pytest.fixture
def client_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with connected_hub(tmp_path / "cache", monkeypatch) as server:
        yield server


def test_a_pull_copies_what_this_release_does_not_know(run, client_at: Hub, tmp_path: Path) -> None:
    content = PROFILE.to_files()
    content["config.json"] = content["config.json"].replace(b"{", b'{"of_tomorrow": 1, ', 1)
    client_at.commit("org/wave", content)
    assert run("pull", "org/wave", "--out", tmp_path / "copy")[0] == 0
    assert (tmp_path / "copy" / "config.json").read_bytes() == content["config.json"]


def test_a_profile_that_is_not_valid_is_not_pulled(run, client_at: Hub, tmp_path: Path) -> None:
    newer = make_profile(statistics={"x": torch.ones(2, 3)}).to_files()
    client_at.commit("org/wave", {**PROFILE.to_files(), "config.json": newer["config.json"]})
    OTHER.save_pretrained(tmp_path / "here")
    status, _, err = run("pull", "org/wave", "--out", tmp_path / "here")
    assert status == 1 and "error: org/wave: expected statistics.safetensors with the SHA" in err
    assert BudgetProfile.from_pretrained(tmp_path / "here").to_files() == OTHER.to_files()


def test_a_hub_that_does_not_answer_is_asked_once(run, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []
    monkeypatch.setattr(
        "hf_reasoncache.profiles.hub.answers", lambda: asked.append(1) or answers(timeout=1.0)
    )
    assert run("show", shipped()[0])[0] == 0 and asked == [], "what is here needs no Hub"
    status, _, err = run("compare", shipped()[0], "org/nothing")
    assert status == 1 and asked == [1]
    assert err.startswith("http://127.0.0.1:9 does not answer: only what is on this machine")
    assert len(err.splitlines()) == 2, "no retries"
    status, _, err = run("pull", "org/nothing", "--out", tmp_path / "new")
    assert status == 1 and asked == [1], "now it is known"
