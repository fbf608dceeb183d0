"""What one calibration found: how much each layer of a model needs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.profiles import files, schema
from hf_reasoncache.profiles.encoding import PARTS, decode, encode
from hf_reasoncache.profiles.fingerprint import fingerprint
from hf_reasoncache.profiles.loading import (
    SHIPPED,
    Directory,
    Source,
    is_shipped,
    read_profile,
    unknown,
)
from hf_reasoncache.profiles.provenance import Calibration
from hf_reasoncache.profiles.statistics import check_statistics


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
        Of its weights, see `hf_reasoncache.profiles.fingerprint`.
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
        for name, kind in PARTS.items():
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

    def check_config(self, config: PretrainedConfig) -> None:
        """Compare with `model.config`: the geometry, and the commit where both are known.

        A model at another commit than the calibrated one gives a warning: its weights may be the
        same, which `check` finds out.

        Raises
        ------
        ValueError
            If the geometry differs, or the model is not supported.
        """
        self._check_geometry(config)
        commit = getattr(config, "_commit_hash", None)
        if commit and self.base_model_revision and commit != self.base_model_revision:
            warnings.warn(
                f"profile: expected {self.base_model} at commit {self.base_model_revision}, got "
                f"{getattr(config, '_name_or_path', '') or 'a model'} at commit {commit}; "
                "profile.check(model) compares the weights.",
                stacklevel=3,
            )

    def check(self, model: PreTrainedModel) -> None:
        """Compare with a model: the geometry, and the weights by their fingerprint.

        Other weights give a warning: the wave of a fine-tuned model may differ from that
        of its base.

        Raises
        ------
        ValueError
            If the geometry differs, the model is not supported, or weights have no data.
        """
        self._check_geometry(model.config)
        found = fingerprint(model)
        if found != self.fingerprint:
            warnings.warn(
                f"profile: expected the weights of {self.base_model} (fingerprint "
                f"{self.fingerprint}), got other ones ({found}); calibrate this model, or check on "
                "your task that the profile fits it.",
                stacklevel=2,
            )

    def _check_geometry(self, config: PretrainedConfig) -> None:
        if differences := self.geometry.differences(Geometry.of(config)):
            raise ValueError(
                f"profile: expected a model with the geometry of {self.base_model}, got "
                f"{'; '.join(differences)}; use a profile that was calibrated on this model."
            )

    # ---------------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        with_statistics: bool = True,
    ) -> BudgetProfile:
        """Load a profile from a directory, from this package, or from the Hub.

        Parameters
        ----------
        path_or_repo : str or path
            A directory; where there is none of that name, a profile of this package, as
            "SmolLM2-135M-Instruct/sensitivity"; otherwise a repository ORG/NAME.
        revision : str, optional
            Branch, tag or commit of the repository; with one, the package is not looked at.
        local_files_only : bool
            Whether to look for the repository in the Hub's cache only; so does HF_HUB_OFFLINE=1.
        cache_dir : path, optional
            The Hub's cache.
        token : str or bool, optional
            For the Hub.
        with_statistics : bool
            Whether to load the statistics, if the profile has them. Budgets do not need them.

        Raises
        ------
        ValueError
            If the files are no valid profile, or the name is neither a directory nor a repository;
            it lists the profiles of this package.
        OSError
            If a file is not there or cannot be read, or the Hub refuses or cannot be reached.
        """
        source: Source
        name = os.fspath(path_or_repo)
        if Path(name).is_dir():
            source = Directory(Path(name))
        elif revision is None and is_shipped(name):
            source = Directory(SHIPPED / name)
        else:
            # Caches import this module, and a cache with a local profile needs no network.
            from hf_reasoncache.profiles.hub import Repository, is_repo_id

            if not is_repo_id(name):
                raise unknown(name)
            source = Repository(name, revision, local_files_only, cache_dir, token)
        content = read_profile(source, with_statistics=with_statistics)
        return cls.from_files(content, name=source.name)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the profile into a directory, which is made if needed.

        A crash leaves the profile that was there, the new one, or none. Other files stay.

        Raises
        ------
        ValueError
            If the directory's `config.json` is not a profile's, or a file would be too large.
        """
        files.write_profile(Path(directory), self.to_files())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload budget profile",
    ) -> str:
        """Upload the profile with a model card and its picture, in one commit.

        The repository is made if needed; a `README.md` that is there is replaced.

        Parameters
        ----------
        repo_id : str
            ORG/NAME.
        private : bool, optional
            Whether a new repository is private; by default what the organisation has set.
        revision : str, optional
            Branch to commit to.
        token : str or bool, optional
        commit_message : str

        Returns
        -------
        str
            Address of the commit.

        Raises
        ------
        OSError
            If access is denied or the upload fails; nothing is committed then.
        ValueError
            If the repository has a `config.json` that is not a profile's, as a model has.
        ModuleNotFoundError
            If matplotlib, which draws the picture, is not installed.
        """
        from hf_reasoncache.profiles.card import card_files
        from hf_reasoncache.profiles.hub import upload

        return upload(
            {**self.to_files(), **card_files(self, repo_id)},
            repo_id,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
        )

    def to_files(self) -> dict[str, bytes]:
        """Return the content of the profile's files by name; equal profiles give equal bytes."""
        return encode(vars(self), self.statistics)

    @classmethod
    def from_files(cls, content: Mapping[str, bytes], *, name: str = "profile") -> BudgetProfile:
        """Make a profile of what `to_files` returned; without the second file, no statistics.

        Raises
        ------
        ValueError
            If it is not valid, beginning with `name`.
        """
        try:
            return cls(**schema.fields(cls, "profile", decode(content)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
