"""Profiles inside the package: found by name, behind directories and before the Hub."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from transformers import LlamaConfig

from hf_reasoncache import BudgetProfile, ReasonAllocCache
from hf_reasoncache.profiles.loading import SHIPPED, shipped
from tests.support.profiles import make_profile

NAME = "SmolLM2-135M-Instruct/sensitivity"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the Hub gets an error at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def smollm2() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )


def test_the_shipped_profiles_are_those_of_the_folder(no_hub: None) -> None:
    found = {path.parent.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("config.json")}
    assert NAME in found and set(shipped()) == found
    for name in shipped():
        profile = BudgetProfile.from_pretrained(name)
        assert (profile.base_model, profile.estimator) == tuple(name.split("/"))
        assert profile.statistics


def test_a_cache_takes_one_by_name(no_hub: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = ReasonAllocCache(smollm2(), budget=128, profile=NAME)
    demand = BudgetProfile.from_pretrained(SHIPPED / NAME).demand
    assert cache.own_layers[0].policy.demand == demand


def test_a_directory_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = make_profile(demand=(1.0, 2.0, 3.0))
    mine.save_pretrained(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert BudgetProfile.from_pretrained(NAME) == mine


def test_a_revision_means_the_hub(no_hub: None, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        BudgetProfile.from_pretrained(NAME, revision="main", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "name", ["SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct/sensitive", "Another-Model", "../x"]
)
def test_an_unknown_name_lists_those_that_there_are(no_hub: None, name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"({', '.join(shipped())})")) as caught:
        BudgetProfile.from_pretrained(name)
    assert f"got '{name}'" in str(caught.value)
