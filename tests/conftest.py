"""Settings that every test shares: the seed, the threads, and how Hypothesis searches."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker per core already keeps the cores busy.
    torch.set_num_threads(1)

# No deadline: the first example pays for compilation and for a core that others use too. On the
# server every run searches alike, so that a red build is about the change and not about luck.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Give every test the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)
