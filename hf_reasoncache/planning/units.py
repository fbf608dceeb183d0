"""Amounts of memory, as people write them."""

from __future__ import annotations

import re

from hf_reasoncache.messages import shown

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}

_MOST = 1000**5
"""A petabyte."""


def parse_bytes(text: str, name: str = "memory") -> int:
    """Turn "80GB" (80 * 10^9), "80GiB" (80 * 2^30) or a bare number of bytes into bytes.

    Raises
    ------
    ValueError
        If the text is none of these, below one byte, or more than any machine has; `name` is what
        it is for.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([KMGT]?I?B|)\s*", text.upper())
    if (
        found is None
        or found[2] not in _UNITS
        or not 1 <= float(found[1]) * _UNITS[found[2]] <= _MOST
    ):
        raise ValueError(
            f"{name}: expected an amount such as 80GB (80 * 10^9 bytes) or 80GiB (80 * 2^30), got "
            f"{shown(text)}."
        )
    return round(float(found[1]) * _UNITS[found[2]])


def amount(count: float) -> str:
    """Bytes as text: "59.94 GB", or "0.94 MB" below 10^8; units of 10^9 and 10^6 bytes."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
