from __future__ import annotations

import pytest

from hf_reasoncache.planning.devices import DEVICES, Device, find_device
from hf_reasoncache.planning.units import amount, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GB", 80 * 10**9),
        ("80GiB", 80 * 2**30),
        ("80 gb", 80 * 10**9),
        ("1.5TiB", 3 * 2**39),
        (".5MB", 500_000),
        ("12KiB", 12 * 1024),
        ("7B", 7),
        ("123456", 123456),
    ],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "80G", "80 Gb s", "-1GB", "0GB", "1e9", "nan", "80GBB", "9" * 400, "1001TB"]
)
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected an amount such as 80GB \(80 \* 10\^9 bytes\)"):
        parse_bytes(text)


def test_amounts_as_text() -> None:
    assert [amount(x) for x in (59_944e6, 10**8, 940_000)] == ["59.94 GB", "0.10 GB", "0.94 MB"]


def test_devices_are_found_by_name() -> None:
    assert find_device("h200-sxm") is DEVICES["H200-SXM"]
    assert all(device.source.startswith("https://") for device in DEVICES.values())
    with pytest.raises(ValueError, match=r"expected one of A100-40GB, .* got 'H300'"):
        find_device("H300")
    with pytest.raises(ValueError, match="bandwidth: expected a finite number > 0, got 0"):
        Device("x", 1, 0.0, 1.0, "")
