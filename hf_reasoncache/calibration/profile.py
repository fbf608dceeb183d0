"""What one calibration found: how much each layer of a model needs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.calibration import files, schema
from hf_reasoncache.calibration.fingerprint import fingerprint
from hf_reasoncache.calibration.provenance import Calibration
from hf_reasoncache.calibration.statistics import (
    check_statistics,
    dump_statistics,
    parse_statistics,
)
from hf_reasoncache.geometry import Geometry

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class BudgetProfile:
    """The demand of each full-attention layer of a model, and how it was measured.

    On disk it is a directory with `config.json` and, where there are statistics,
    `statistics.safetensors`; docs/profiles.md describes them for readers in other languages. Demand
    and rule are ReasonAlloc's (arXiv 2606.11164); format, errors and statistics are ours.

    Attributes
    ----------
    base_model : str
        Id on the Hub, or name of the directory, of the model that was calibrated.
    base_model_revision : str or None
        Its commit on the Hub.
    fingerprint : str
        Of its weights, see `hf_reasoncache.calibration.fingerprint`.
    geometry : Geometry
    estimator : str
        How demand was measured: "coverage", "sensitivity", or another name.
    demand : tuple of float
        One per full-attention layer, in any unit, not all 0. Only ratios matter.
    standard_error : tuple of float
        Of each demand, over the prompts, in the same unit.
    head_demand : tuple of tuple of float, or None
        One row per layer, one entry per KV head.
    rule : BudgetRule
        How demand becomes budgets.
    calibration : Calibration
    statistics : Mapping of str to Tensor
        Measurements behind the demand, `[prompts, layers, ...]`. Not compared by `==`.

    Raises
    ------
    ValueError
        If a field has another type, length or range. Lists and integers become tuples and floats.
    """

    base_model: str
    base_model_revision: str | None = None
    fingerprint: str
    geometry: Geometry
    estimator: str
    demand: tuple[float, ...]
    standard_error: tuple[float, ...]
    head_demand: tuple[tuple[float, ...], ...] | None = None
    rule: BudgetRule = field(default_factory=BudgetRule)
    calibration: Calibration
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check and normalise."""
        for name, kind in _PARTS.items():
            if not isinstance(part := getattr(self, name), kind):
                schema.refuse(name, f"a {kind.__name__}", part)
        layers, heads = len(self.geometry.full_attention_layers), self.geometry.kv_heads
        demand = schema.amounts("demand", self.demand, layers)
        if not any(demand):
            schema.refuse("demand", "at least one number > 0", demand)
        by_head = self.head_demand
        if by_head is not None:
            rows = schema.sequence("head_demand", by_head, "rows, one per layer", layers)
            by_head = tuple(
                schema.amounts(f"head_demand[{index}]", row, heads)
                for index, row in enumerate(rows)
            )
        check_statistics(self.statistics, prompts=len(self.calibration.prompts), layers=layers)
        schema.assign(
            self,
            base_model=schema.text("base_model", self.base_model),
            base_model_revision=schema.optional_text(
                "base_model_revision", self.base_model_revision
            ),
            fingerprint=schema.matching(
                "fingerprint", self.fingerprint, r"[a-z0-9-]{1,64}:[0-9a-f]{64}", "scheme:SHA-256"
            ),
            estimator=schema.text("estimator", self.estimator),
            demand=demand,
            standard_error=schema.amounts("standard_error", self.standard_error, layers),
            head_demand=by_head,
            statistics=dict(self.statistics),
        )

    # ------------------------------------------------------------------------------------------ use

    def layer_budgets(self, budget: int, *, floor: int = 0) -> list[int]:
        """Tokens per KV head of each full-attention layer, `budget` on average.

        Raises
        ------
        ValueError
            If no layer budgets within the rule's bounds hold `floor` tokens each.
        """
        return self.rule.layer_budgets(self.demand, budget, floor=floor)

    def check_config(self, config: Any) -> None:
        """Compare with `model.config`: geometry, and the commit where both are known.

        A model from the Hub under another id or of another commit gives a warning that says what
        differs. A directory says nothing about its weights; `check` looks at them.

        Raises
        ------
        ValueError
            If the geometry differs, or the model is not supported.
        """
        if differences := self.geometry.differences(Geometry.of(config)):
            raise ValueError(
                f"profile: expected a model with the geometry of {self.base_model}, got "
                f"{'; '.join(differences)}; use a profile that was calibrated on this model."
            )
        name = getattr(config, "_name_or_path", "") or "this model"
        commit = getattr(config, "_commit_hash", None)
        other_commit = commit and self.base_model_revision and commit != self.base_model_revision
        if other_commit:
            warnings.warn(
                f"profile of {self.base_model} at commit {self.base_model_revision}: {name} is at "
                f"commit {commit}. profile.check(model) compares the weights.",
                stacklevel=2,
            )

    def check(self, model: nn.Module) -> None:
        """Compare with a model: `check_config`, and its weights by their fingerprint.

        Other weights give a warning: a fine-tuned model often has the wave of its base, but nobody
        has measured it.

        Raises
        ------
        ValueError
            If the geometry differs, or weights have no data.
        """
        self.check_config(model.config)
        found = fingerprint(model)
        if found != self.fingerprint:
            warnings.warn(
                f"profile of {self.base_model}: expected weights with the fingerprint "
                f"{self.fingerprint}, got {found}; calibrate this model, or check on your "
                "task that the profile fits it.",
                stacklevel=2,
            )

    # ---------------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> BudgetProfile:
        """Load a profile from a directory.

        Raises
        ------
        ValueError
            If the files are no valid profile.
        FileNotFoundError
            If there is no `config.json`.
        """
        directory = Path(path)
        config, statistics = directory / files.CONFIG, directory / files.STATISTICS
        profile, digest = cls._parse(str(config), files.read_bounded(config))
        if digest is None:
            return profile
        data = files.read_bounded(statistics)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(
                f"{statistics}: expected SHA-256 {digest}, as {files.CONFIG} says, got other "
                "content; copy or download the profile again."
            )
        return dataclasses.replace(profile, statistics=parse_statistics(str(statistics), data))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the profile into a directory, which is made if needed.

        A crash leaves the profile that was there, the new one, or none. Other files stay.

        Raises
        ------
        ValueError
            If the directory's `config.json` is not a profile's, or a file would be too large.
        """
        target = Path(directory)
        config = target / files.CONFIG
        if config.exists() and b'"format_version"' not in files.read_bounded(config):
            raise ValueError(
                f"{config}: expected no file or a profile's, got another file, perhaps a model's "
                "config; save into a directory of its own."
            )
        files.write_profile(target, self.to_files())

    def to_files(self) -> dict[str, bytes]:
        """Return the content of the profile's files by name; equal profiles give equal bytes."""
        result = {}
        digest = None
        if self.statistics:
            result[files.STATISTICS] = dump_statistics(self.statistics)
            digest = {"sha256": hashlib.sha256(result[files.STATISTICS]).hexdigest()}
        content = {"format_version": FORMAT_VERSION, **vars(self), "statistics": digest}
        content |= {name: vars(getattr(self, name)) for name in _PARTS}
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        return {files.CONFIG: text.encode(), **result}

    @classmethod
    def _parse(cls, name: str, data: bytes) -> tuple[BudgetProfile, str | None]:
        """Read `config.json`: the profile without statistics, and their SHA-256 if any."""
        content = schema.parse(name, data)
        version = content.get("format_version")
        if version is None:
            raise ValueError(f"{name}: expected a profile with a format_version, got none.")
        if schema.count(f"{name}: format_version", version) != FORMAT_VERSION:
            raise ValueError(
                f"{name}: expected format_version {FORMAT_VERSION}, got {version}; upgrade "
                "hf-reasoncache to a release that reads it."
            )
        digest = content.pop("statistics", None)
        try:
            if digest is not None:
                digest = schema.matching(
                    "statistics.sha256",
                    digest.get("sha256") if isinstance(digest, dict) else digest,
                    "[0-9a-f]{64}",
                    "64 hexadecimal digits",
                )
            parts = {
                part: kind(**schema.fields(kind, part, content[part]))
                for part, kind in _PARTS.items()
                if part in content
            }
            return cls(**{**schema.fields(cls, "profile", content), **parts}), digest
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


_PARTS = {"geometry": Geometry, "rule": BudgetRule, "calibration": Calibration}
