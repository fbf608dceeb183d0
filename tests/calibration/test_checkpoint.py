"""Checkpoints: whole or not there, bit for bit, and never another run's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from hf_reasoncache.calibration.checkpoint import Checkpoint

SETTINGS = {"seed": 1, "shares": (0.5, 0.93), "nested": {"a": None}}


def test_a_part_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "x.partial")
    checkpoint.begin(SETTINGS, resume=True)
    values = {"a": torch.rand(3, 4, dtype=torch.float64) / 3, "b": torch.tensor(7)}
    assert checkpoint.load("one") is None
    checkpoint.save("one", values | {"a": values["a"].T})
    again = Checkpoint(tmp_path / "x.partial")
    again.begin(SETTINGS, resume=True)
    found = again.require("one")
    assert torch.equal(found["a"], values["a"].T) and torch.equal(found["b"], values["b"])
    again.remove()
    assert not (tmp_path / "x.partial").exists()
    again.remove()


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "x.partial")
    checkpoint.begin(SETTINGS, resume=True)
    checkpoint.save("one", {"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"differs in seed \(1 there, 2 now\); .* --no-resume"):
        checkpoint.begin(SETTINGS | {"seed": 2}, resume=True)
    assert checkpoint.load("one") is not None
    checkpoint.begin(SETTINGS | {"seed": 2}, resume=False)
    assert checkpoint.load("one") is None


def test_a_missing_part_names_the_likely_cause(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "x.partial")
    checkpoint.begin(SETTINGS, resume=True)
    with pytest.raises(ValueError, match="must see the same output directory"):
        checkpoint.require("one")


def test_a_damaged_part_is_an_error(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "x.partial")
    checkpoint.begin(SETTINGS, resume=True)
    checkpoint.save("one", {"a": torch.ones(100)})
    path = tmp_path / "x.partial" / "one.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged file"):
        checkpoint.load("one")


def test_a_crash_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path / "x.partial")
    checkpoint.begin(SETTINGS, resume=True)

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for how, said in (
        (crash, "disk full"),
        (full, r"No space left .* make room .*one.safetensors"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", how)
            with pytest.raises(OSError, match=said):
                checkpoint.save("one", {"a": torch.ones(1)})
    assert checkpoint.load("one") is None
    checkpoint.save("one", {"a": torch.ones(1)})
    assert checkpoint.load("one") is not None


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, "[]", "\xff", '{"seed": 1, "seed": 1}']
)
def test_damaged_settings_are_named(tmp_path: Path, content: str) -> None:
    checkpoint = Checkpoint(tmp_path / "x.partial")
    checkpoint.begin(SETTINGS, resume=True)
    (checkpoint.directory / "settings.json").write_text(content, "latin-1")
    with pytest.raises(ValueError, match=r"x.partial/settings.json: expected"):
        checkpoint.begin(SETTINGS, resume=True)


@pytest.mark.parametrize("when", ["first write", "last deletion"])
def test_a_crash_at_either_end_does_not_block_the_next_run(tmp_path: Path, when: str) -> None:
    checkpoint = Checkpoint(tmp_path / "x.partial")
    checkpoint.directory.mkdir()
    if when == "first write":
        (checkpoint.directory / ".settings.json.123").write_text("{")
    for resume in (True, False):
        checkpoint.begin(SETTINGS, resume=resume)
        checkpoint.save("one", {"a": torch.ones(1)})
    checkpoint.remove()
    assert not checkpoint.directory.exists()


def test_another_directory_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for action in (
        Checkpoint(tmp_path).remove,
        lambda: Checkpoint(tmp_path).begin(SETTINGS, resume=False),
        lambda: Checkpoint(tmp_path).begin(SETTINGS, resume=True),
    ):
        with pytest.raises(ValueError, match="got another directory"):
            action()
    assert (tmp_path / "thesis.tex").exists()
