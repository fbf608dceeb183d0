"""The settings of a calibration, and how they are written down."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
import transformers

from hf_reasoncache.calibration.estimate import Estimator
from hf_reasoncache.calibration.sensitivity import Sensitivity
from hf_reasoncache.calibration.together import Check
from hf_reasoncache.calibration.traces import TraceSettings
from hf_reasoncache.calibration.tune import Tune
from hf_reasoncache.scorers.base import Scorer
from hf_reasoncache.version import __version__


@dataclass(frozen=True)
class CalibrationSettings:
    """All that a profile depends on besides model and prompts.

    Attributes
    ----------
    estimator : Estimator
        `Sensitivity`, ours, or `Coverage`, the paper's.
    traces : TraceSettings
        How the model answers the prompts.
    tune : Tune or None
        Whether and how the budget rule is chosen by measured error.
    check : Check or None
        Whether and how the profile is compared with equal layers on the texts that it was measured
        on.
    chat : bool
        Whether prompts of plain text become the message of a user.
    queries : bool
        Whether the profile's statistics also have those of the queries, for `TriAttention`.
    """

    estimator: Estimator = field(default_factory=Sensitivity)
    traces: TraceSettings = field(default_factory=TraceSettings)
    tune: Tune | None = None
    check: Check | None = None
    chat: bool = False
    queries: bool = False

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; a scorer shows as its repr."""
        return plain(self)


def plain(value: object) -> Any:
    """Settings as JSON values; a scorer shows as its repr."""
    if is_dataclass(value) and not isinstance(value, type | Scorer):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    # Scorers are dataclasses too, but their name matters most, and their repr has it.
    return value if isinstance(value, str | int | float | None) else repr(value)


def digest(value: object) -> str:
    """16 hexadecimal digits that identify settings or token ids."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Releases that a measurement may depend on."""
    return {
        "hf-reasoncache": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the settings in which an earlier run differs from this one, with both values."""
    return sorted(
        f"{name} ({found.get(name)!r:.40} there, {wanted.get(name)!r:.40} now)"
        for name in {*found, *wanted}
        if found.get(name) != wanted.get(name)
    )
