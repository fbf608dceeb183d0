"""A profile as an object and as files: what goes in comes out, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_reasoncache import BudgetProfile, ReasonAllocCache
from hf_reasoncache.budgets import BudgetRule, layer_budgets
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.profiles import Calibration, files, fingerprint
from hf_reasoncache.profiles.encoding import FORMAT_VERSION
from tests.support.models import build
from tests.support.profiles import COMMIT, make_profile

ROOT = Path(__file__).resolve().parents[2]
PROFILE = make_profile()


def saved(directory: Path, profile: BudgetProfile = PROFILE) -> Path:
    profile.save_pretrained(directory)
    return directory


def change_config(directory: Path, **changes: Any) -> Path:
    """Edit `config.json`; a value of ... removes the field."""
    path = directory / files.CONFIG
    content = json.loads(path.read_text()) | changes
    content = {name: value for name, value in content.items() if value is not ...}
    path.write_text(json.dumps(content))
    return directory


# ------------------------------------------------------------------------------------- round trip


def test_round_trip_is_exact(tmp_path: Path) -> None:
    found = BudgetProfile.from_pretrained(saved(tmp_path))
    assert found == PROFILE
    assert found.statistics.keys() == PROFILE.statistics.keys()
    for name, tensor in PROFILE.statistics.items():
        assert found.statistics[name].dtype == tensor.dtype
        assert torch.equal(found.statistics[name], tensor)
    assert found.to_files() == PROFILE.to_files()


def test_equal_profiles_give_equal_bytes_whatever_the_order() -> None:
    turned = make_profile(statistics=dict(reversed(PROFILE.statistics.items())))
    assert turned.to_files() == PROFILE.to_files()


def test_without_statistics(tmp_path: Path) -> None:
    saved(tmp_path)
    lean = BudgetProfile.from_pretrained(tmp_path, with_statistics=False)
    assert lean == PROFILE and not lean.statistics
    lean.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert not BudgetProfile.from_pretrained(tmp_path).statistics


def test_unknown_fields_are_ignored_at_every_level(tmp_path: Path) -> None:
    saved(tmp_path)
    content = json.loads((tmp_path / files.CONFIG).read_text())
    for part in (content, content["geometry"], content["rule"], content["calibration"]):
        part["of_tomorrow"] = {"nested": [1, None]}
    (tmp_path / files.CONFIG).write_text(json.dumps(content))
    assert BudgetProfile.from_pretrained(tmp_path) == PROFILE


def test_optional_fields_may_be_missing(tmp_path: Path) -> None:
    saved(tmp_path, make_profile(statistics={}))
    change_config(tmp_path, base_model_revision=..., head_demand=..., rule=..., statistics=...)
    found = BudgetProfile.from_pretrained(tmp_path)
    assert found.rule == BudgetRule(0.5, 0.25, 2.0)
    assert found.base_model_revision is None and found.head_demand is None


# ------------------------------------------------------------------------------------- validation

WRONG = {
    "base_model": ["", 3, None, "a\nb", "\x1b[2J", "\ud800"],
    "base_model_revision": ["", 5],
    "fingerprint": ["", "0" * 64, "x:" + "g" * 64, None, "a b:" + "0" * 64],
    "geometry": [None, {}, (0, 1, 2)],
    "estimator": ["", None],
    "demand": [
        (1.0, 2.0),
        (1.0,) * 4,
        (0, 0, 0),
        (1, -1, 1),
        (1, math.nan, 1),
        (1, math.inf, 1),
        (1, True, 1),
        (1, "1", 1),
        (1, 10**400, 1),
        "123",
        None,
        5,
        {0: 1, 1: 1, 2: 1},
    ],
    "standard_error": [(1.0, 2.0), (0.0, -1e-9, 0.0), (0, math.nan, 0), None],
    "head_demand": [((1, 2),) * 2, ((1,),) * 3, ((1, 2), (1, 2), (1, -2)), ((1, 2), 5, (1, 2)), 7],
    "rule": [None, {"exponent": 0.5}],
    "calibration": [None, {}],
    "statistics": [
        [1],
        {"a": [1.0]},
        {"a": torch.ones(3, 3)},
        {"a": torch.ones(2, 2)},
        {"a": torch.ones(2)},
        {"a": torch.tensor(1.0)},
        {"a": torch.full((2, 3), math.nan)},
        {"a": torch.ones(2, 3, dtype=torch.bool)},
        {"a": torch.ones(2, 3, dtype=torch.complex64)},
        {"": torch.ones(2, 3)},
        {"a\n": torch.ones(2, 3)},
        {3: torch.ones(2, 3)},
    ],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_fields(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*expected .*got "):
        make_profile(**{name: value})


@pytest.mark.parametrize(
    "change",
    [
        {"data": ""},
        {"data": None},
        {"prompts": ("abc",)},
        {"prompts": ("A" * 64,)},
        {"prompts": "a" * 64},
        {"prompts": None},
        {"seed": -1},
        {"seed": 1.5},
        {"seed": True},
        {"seed": 2**64},
        {"tokens": -1},
        {"tokens": "1"},
        {"settings": []},
        {"settings": {1: 2}},
        {"settings": {"a": math.nan}},
        {"settings": {"a": object()}},
        {"settings": {"\n": 1}},
        {"versions": {"torch": 2}},
        {"versions": {"torch": "2\n"}},
    ],
)
def test_wrong_calibration(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected .*got"):
        dataclasses.replace(PROFILE.calibration, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"full_attention_layers": ()},
        {"full_attention_layers": (1, 0)},
        {"full_attention_layers": (0, 0)},
        {"full_attention_layers": (-1, 0)},
        {"full_attention_layers": (0.0,)},
        {"full_attention_layers": 3},
        {"kv_heads": 0},
        {"kv_heads": True},
        {"head_size": 1.5},
    ],
)
def test_wrong_geometry(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected .*got"):
        dataclasses.replace(PROFILE.geometry, **change)


def test_prompts_may_come_as_a_list() -> None:
    calibration = Calibration(data="x", prompts=["a" * 64, "b" * 64], seed=0, tokens=1)
    assert calibration.prompts == ("a" * 64, "b" * 64)
    assert make_profile(demand=[1, 2, 3]).demand == (1.0, 2.0, 3.0)


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**9])
def test_newer_format(tmp_path: Path, version: int) -> None:
    change_config(saved(tmp_path), format_version=version)
    with pytest.raises(ValueError, match=rf"format_version 1, got {version}; install the newest"):
        BudgetProfile.from_pretrained(tmp_path)


@pytest.mark.parametrize("version", [..., None, "1", 1.0, True, -1, 0])
def test_no_format(tmp_path: Path, version: object) -> None:
    change_config(saved(tmp_path), format_version=version)
    with pytest.raises(ValueError, match="format_version"):
        BudgetProfile.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "field", ["base_model", "fingerprint", "geometry", "demand", "standard_error", "calibration"]
)
def test_missing_field(tmp_path: Path, field: str) -> None:
    change_config(saved(tmp_path), **{field: ...})
    with pytest.raises(ValueError, match=f"expected the field '{field}', got none"):
        BudgetProfile.from_pretrained(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: expected this file of a profile"):
        BudgetProfile.from_pretrained(tmp_path)
    saved(tmp_path)
    (tmp_path / files.STATISTICS).unlink()
    with pytest.raises(FileNotFoundError, match=r"statistics\.safetensors: expected"):
        BudgetProfile.from_pretrained(tmp_path)
    assert BudgetProfile.from_pretrained(tmp_path, with_statistics=False) == PROFILE


@pytest.mark.parametrize("name", files.LIMITS)
def test_size_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    size = len(PROFILE.to_files()[name])
    saved(tmp_path)
    monkeypatch.setitem(files.LIMITS, name, size)
    assert BudgetProfile.from_pretrained(tmp_path) == PROFILE
    monkeypatch.setitem(files.LIMITS, name, size - 1)
    with pytest.raises(ValueError, match=rf"expected at most {size - 1:,} bytes, got {size:,}"):
        BudgetProfile.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"expected at most {size - 1:,} bytes, got {size:,}"):
        PROFILE.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_that_never_ends(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / files.STATISTICS).unlink()
    os.mkfifo(tmp_path / files.STATISTICS)
    with pytest.raises(ValueError, match="expected a regular file"):
        BudgetProfile.from_pretrained(tmp_path)
    (tmp_path / files.CONFIG).unlink()
    (tmp_path / files.CONFIG).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="expected a regular file"):
        BudgetProfile.from_pretrained(tmp_path)


def test_a_profile_names_no_files(tmp_path: Path) -> None:
    """Paths in a profile lead nowhere: the two names are fixed."""
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(PROFILE.to_files()[files.STATISTICS])
    saved(tmp_path / "profile", make_profile(statistics={}))
    for path in ("../secret.safetensors", str(secret)):
        change_config(
            tmp_path / "profile",
            statistics={"sha256": path},
            statistics_file=path,
            base_model=path,
        )
        with pytest.raises(ValueError, match=r"statistics\.sha256: expected 64 hexadecimal"):
            BudgetProfile.from_pretrained(tmp_path / "profile")


def test_a_models_config_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="expected no file or a profile's, got another file"):
        PROFILE.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


@pytest.mark.parametrize("new", [make_profile(demand=(9, 9, 9)), make_profile(statistics={})])
@pytest.mark.parametrize("fail_at", range(11))
def test_a_crash_leaves_the_old_profile_the_new_one_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: BudgetProfile, fail_at: int
) -> None:
    """Fail at every system call of a write in turn, as a kill would, without any clean-up."""
    saved(tmp_path)
    (tmp_path / "notes.md").write_text("stays")
    calls = iter(range(1000))

    class Killed(BaseException):
        pass

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) >= fail_at:
                raise Killed
            return function(*arguments, **options)

        return call

    for owner, name in [
        (os, "fsync"),
        (Path, "open"),
        (Path, "replace"),
        (Path, "unlink"),
    ]:
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    try:
        new.save_pretrained(tmp_path)
        finished = True
    except Killed:
        finished = False
    monkeypatch.undo()
    assert finished or fail_at < 10, "the longest write makes 10 calls"
    assert (tmp_path / "notes.md").read_text() == "stays"
    if finished:
        assert BudgetProfile.from_pretrained(tmp_path).to_files() == new.to_files()
        assert not list(tmp_path.glob(".*"))
    elif (tmp_path / files.CONFIG).exists():
        found = BudgetProfile.from_pretrained(tmp_path).to_files()
        assert found in (PROFILE.to_files(), new.to_files())


# -------------------------------------------------------------------------------------------- use


def test_layer_budgets_follow_the_rule_of_the_profile() -> None:
    expected = layer_budgets(PROFILE.demand, 100, exponent=0.7, low=0.2, high=1.9, floor=30)
    assert PROFILE.layer_budgets(100, floor=30) == expected
    assert expected != layer_budgets(PROFILE.demand, 100, floor=30)


@given(
    demand=st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3),
    budget=st.integers(20, 5000),
    exponent=st.floats(0, 2),
    low=st.floats(0, 1),
    high=st.floats(1, 4),
)
def test_the_reader_in_the_docs(
    demand: list[float], budget: int, exponent: float, low: float, high: float
) -> None:
    """Twenty lines of plain Python give the budgets, up to rounding."""
    page = (ROOT / "docs" / "profiles.md").read_text()
    code = next(part for part in page.split("```python\n") if part.startswith("import json"))
    code = code.split("```")[0].replace("budget = 1024", f"budget = {budget}")
    profile = make_profile(demand=demand, rule=BudgetRule(exponent, low, high))
    config = io.StringIO(profile.to_files()[files.CONFIG].decode())
    found: dict[str, Any] = {"open": lambda name: config}
    exec(code, found)
    assert found["layer_budgets"] == pytest.approx(profile.layer_budgets(budget), abs=2)


def test_the_cache_takes_a_profile_a_directory_or_a_list(tmp_path: Path) -> None:
    config = build("llama").config
    saved(tmp_path)

    def budgets(profile: Any) -> list[int]:
        cache = ReasonAllocCache(config, budget=64, profile=profile)
        return [layer.policy.layer_budget(10, 40) for layer in cache.layers]

    expected = PROFILE.layer_budgets(64, floor=18)
    assert budgets(PROFILE) == budgets(tmp_path) == budgets(str(tmp_path)) == expected
    assert budgets(PROFILE.demand) == layer_budgets(PROFILE.demand, 64, floor=18) != expected


def test_hybrid_models(tmp_path: Path) -> None:
    config = build("gemma3").config
    geometry = Geometry.of(config)
    assert geometry == Geometry((0, 2), kv_heads=2, head_size=16)
    profile = make_profile(
        geometry=geometry, demand=(1, 3), standard_error=(0, 0), head_demand=None, statistics={}
    )
    cache = ReasonAllocCache(config, budget=64, profile=profile)
    budgets = [cache.layers[index].policy.layer_budget(0, 40) for index in (0, 2)]
    assert budgets == profile.layer_budgets(64, floor=8)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gemma3", r"full_attention_layers \[0, 2\], not \[0, 1, 2\]"),
        ("qwen2_sliding", r"full_attention_layers .*head_size 8, not 16"),
    ],
)
def test_another_geometry(name: str, found: str) -> None:
    model = build(name)
    message = rf"expected a model with the geometry of org/model, got {found}"
    with pytest.raises(ValueError, match=message):
        ReasonAllocCache(model.config, budget=None, profile=PROFILE)
    with pytest.raises(ValueError, match=message):
        PROFILE.check(model)


def test_another_commit_is_a_warning() -> None:
    config = build("llama").config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReasonAllocCache(config, budget=64, profile=PROFILE)
        config._commit_hash = COMMIT
        ReasonAllocCache(config, budget=64, profile=PROFILE)
    config._commit_hash, config._name_or_path = "d" * 40, "org/other"
    with pytest.warns(UserWarning, match=rf"org/model at commit {COMMIT}, got org/other at .*dddd"):
        ReasonAllocCache(config, budget=64, profile=PROFILE)


def test_other_weights_are_a_warning() -> None:
    model = build("llama")
    profile = make_profile(fingerprint=fingerprint(model))
    model.config._commit_hash = "d" * 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The weights are what counts: the commit may have changed a README.
        profile.check(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.warns(UserWarning, match=r"expected the weights of org/model .* got other ones"):
        profile.check(model)
