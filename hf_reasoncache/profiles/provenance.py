"""Where a profile comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_reasoncache.messages import shown
from hf_reasoncache.profiles import schema


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The run that measured a profile.

    Attributes
    ----------
    data : str
        Name of the prompts: a file's name or a data set's id.
    data_revision : str or None
        Commit of the data set.
    prompts : tuple of str
        SHA-256 of each prompt's text in UTF-8, 64 hexadecimal digits, in the order of the run.
    seed : int
    tokens : int
        Tokens that were generated, all prompts together.
    settings : Mapping
        Settings of the run, JSON values.
    versions : Mapping
        Versions of the libraries, by name.

    Raises
    ------
    ValueError
        If a field has another type or form.
    """

    data: str
    data_revision: str | None = None
    prompts: tuple[str, ...]
    seed: int
    tokens: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check and normalise."""
        prompts = schema.sequence("prompts", self.prompts, "SHA-256 hashes")
        versions = schema.plain_json("versions", self.versions)
        schema.assign(
            self,
            data=schema.text("data", self.data),
            data_revision=schema.optional_text("data_revision", self.data_revision),
            prompts=tuple(
                schema.matching(f"prompts[{index}]", each, "[0-9a-f]{64}", "64 hexadecimal digits")
                for index, each in enumerate(prompts)
            ),
            seed=schema.count("seed", self.seed),
            tokens=schema.count("tokens", self.tokens),
            settings=schema.plain_json("settings", self.settings),
            versions={
                key: schema.text(f"versions[{shown(key)}]", versions[key]) for key in versions
            },
        )
