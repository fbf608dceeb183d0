"""Bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**n for n, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}iB": 1024**n for n, prefix in enumerate("KMGT", 1)}


def parse_bytes(text: str) -> int:
    """Turn "2GB" (10^9 bytes each) or "1.5GiB" (2^30) into bytes; ValueError for anything else."""
    found = re.fullmatch(r"([0-9.]+) *([A-Za-z]*)", text.strip())
    units = {name.lower(): size for name, size in _UNITS.items()}
    try:
        size = int(float(found[1]) * units[found[2].lower()]) if found else 0
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        known = ", ".join(name for name in _UNITS if name)
        raise ValueError(f"--memory: expected bytes such as 2GB or 1.5GiB ({known}), got {text!r}.")
    return size


def show_bytes(size: int) -> str:
    """Write bytes with a unit: "1.98 GB"."""
    for prefix in ("", "K", "M", "G"):
        if size < 1000 or prefix == "G":
            break
        size /= 1000
    return f"{size:.3g} {prefix}B"
