"""What the CPU can do, where that decides which of two ways is faster."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch


@cache
def capabilities() -> Mapping[str, Any]:
    """Say by name which instructions the CPU has; older releases of torch do not know."""
    return getattr(torch.cpu, "get_capabilities", dict)()
