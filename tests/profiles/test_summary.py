"""Profiles in words: settings stay on a screen."""

from __future__ import annotations

import dataclasses

from hf_reasoncache.profiles.summary import facts
from tests.support.profiles import make_profile


def test_of_a_long_list_only_the_length_is_said() -> None:
    profile = make_profile()
    settings = {"tune": {"held_out": ["a" * 64, "b" * 64], "lows": [0.1, 0.5]}}
    calibration = dataclasses.replace(profile.calibration, settings=settings)
    shown = facts(dataclasses.replace(profile, calibration=calibration))["settings"]
    assert shown == "tune.held_out (2 entries), tune.lows [0.1, 0.5]"
