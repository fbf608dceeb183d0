"""A profile as the bytes of its files, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from hf_reasoncache.budgets.rule import BudgetRule
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.profiles import schema
from hf_reasoncache.profiles.files import CONFIG, STATISTICS
from hf_reasoncache.profiles.provenance import Calibration
from hf_reasoncache.profiles.statistics import dump_statistics, parse_statistics

FORMAT_VERSION = 1
PARTS = {"geometry": Geometry, "rule": BudgetRule, "calibration": Calibration}
"""The fields of a profile that are JSON objects."""


def encode(fields: Mapping[str, Any], statistics: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """Return the content of a profile's files by name; equal fields give equal bytes."""
    result = {}
    digest = None
    if statistics:
        result[STATISTICS] = dump_statistics(statistics)
        digest = {"sha256": hashlib.sha256(result[STATISTICS]).hexdigest()}
    content = {"format_version": FORMAT_VERSION, **fields, "statistics": digest}
    content |= {part: vars(fields[part]) for part in PARTS}
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return {CONFIG: text.encode(), **result}


def decode(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the fields of a profile from the content of its files.

    Fields that are not known are left out: what changes the meaning of a known one changes the
    format version.

    Parameters
    ----------
    files : Mapping of str to bytes
        `config.json`; without `statistics.safetensors` the statistics are empty.

    Raises
    ------
    ValueError
        If this is no profile, or one of a newer format, or the files do not belong together.
    """
    content = _parse(files[CONFIG])
    digest = statistics_digest(files[CONFIG])
    content["statistics"] = {}
    if digest is not None and STATISTICS in files:
        data = files[STATISTICS]
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(
                f"expected {STATISTICS} with the SHA-256 {digest}, as {CONFIG} says, got "
                "other content; copy or download the profile again."
            )
        content["statistics"] = parse_statistics(data)
    for part, kind in PARTS.items():
        if part in content:
            content[part] = kind(**schema.fields(kind, part, content[part]))
    return content


def statistics_digest(config: bytes) -> str | None:
    """Return the SHA-256 that `config.json` gives of the statistics; None if there are none.

    Raises
    ------
    ValueError
        If this is no profile's `config.json`, or one of a newer format.
    """
    value = _parse(config).get("statistics")
    if value is None:
        return None
    if not isinstance(value, dict):
        schema.refuse("statistics", "a JSON object with their sha256", value)
    return schema.matching(
        "statistics.sha256", value.get("sha256"), "[0-9a-f]{64}", "64 hexadecimal digits"
    )


def _parse(config: bytes) -> dict[str, Any]:
    content = schema.parse(CONFIG, config)
    version = content.get("format_version")
    if version is None:
        raise ValueError(
            f"{CONFIG}: expected a profile's, with a format_version, got none; this may be a "
            "model's."
        )
    if schema.count("format_version", version) != FORMAT_VERSION:
        raise ValueError(
            f"{CONFIG}: expected format_version {FORMAT_VERSION}, got {version}; install the "
            "newest hf-reasoncache."
        )
    return content
