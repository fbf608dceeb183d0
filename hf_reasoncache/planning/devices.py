"""What accelerators can do at best, as their makers publish it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_reasoncache.messages import shown


@dataclass(frozen=True)
class Device:
    """Limits of one accelerator, none of which any program reaches.

    Attributes
    ----------
    name : str
    memory : int
        Bytes.
    bandwidth : float
        Bytes per second between memory and cores.
    flops : float
        Operations per second of dense bfloat16 matrix products, a multiplication and an addition
        counted as two.
    source : str
        Where the figures are published.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    source: str

    def __post_init__(self) -> None:
        """Check."""
        for field in ("memory", "bandwidth", "flops"):
            value = getattr(self, field)
            if not 0 < value < math.inf:
                raise ValueError(f"{field}: expected a finite number > 0, got {shown(value)}.")


_AMPERE = "https://www.nvidia.com/en-us/data-center/a100/"

# Where a maker publishes matrix products with 2:4 sparsity only, half of that.
DEVICES = {
    device.name: device
    for device in (
        Device("A100-40GB", 40 * 10**9, 1.555e12, 312e12, _AMPERE),
        Device("A100-80GB", 80 * 10**9, 2.039e12, 312e12, _AMPERE),
        Device(
            "H100-SXM",
            80 * 10**9,
            3.35e12,
            989.5e12,
            "https://www.nvidia.com/en-us/data-center/h100/",
        ),
        Device(
            "H200-SXM",
            141 * 10**9,
            4.8e12,
            989.5e12,
            "https://www.nvidia.com/en-us/data-center/h200/",
        ),
        Device(
            "L40S",
            48 * 10**9,
            0.864e12,
            362.05e12,
            "https://www.nvidia.com/en-us/data-center/l40s/",
        ),
        Device("L4", 24 * 10**9, 0.3e12, 121e12, "https://www.nvidia.com/en-us/data-center/l4/"),
    )
}
"""By name; memory counted as sold, in units of 10^9 bytes."""


def find_device(name: str) -> Device:
    """Return a device of `DEVICES`, however its name is capitalised.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    for known, device in DEVICES.items():
        if known.lower() == name.lower():
            return device
    raise ValueError(
        f"gpu: expected one of {', '.join(DEVICES)}, got {shown(name)}; give --memory, "
        "--bandwidth and --flops for another one."
    )
