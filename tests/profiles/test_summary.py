"""Profiles in words: settings stay on a screen, and what came out is apart from them."""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_reasoncache import BudgetProfile
from hf_reasoncache.profiles.summary import facts
from tests.support.profiles import make_profile


def with_settings(settings: dict[str, Any]) -> BudgetProfile:
    profile = make_profile()
    calibration = dataclasses.replace(profile.calibration, settings=settings)
    return dataclasses.replace(profile, calibration=calibration)


def test_of_a_long_list_only_the_length_is_said() -> None:
    shown = facts(with_settings({"traces": {"texts": ["a" * 64, "b" * 64], "lows": [0.1, 0.5]}}))
    assert shown["settings"] == "traces.texts (2 entries), traces.lows [0.1, 0.5]"


def test_outcomes_have_lines_of_their_own() -> None:
    check = {"budget": 96, "outcome": {"difference": -0.12578300265980863, "verdict": "better"}}
    shown = facts(with_settings({"tune": None, "check": check, "chat": False}))
    assert shown["settings"] == "chat false"
    assert shown["check"] == "budget 96, outcome.difference -0.1258, outcome.verdict better"
    assert "tune" not in shown
    # A profile may come from anywhere.
    assert facts(with_settings({"check": [1]}))["check"] == "check [1]"
