"""Traces of random models, and what those models do with the full cache."""

from __future__ import annotations

import torch

from hf_reasoncache.calibration.traces import Trace
from tests.support.models import VOCABULARY


def make_trace(prompt: int = 21, completion: int = 40, seed: int = 3) -> Trace:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (prompt + completion,), generator=generator).tolist()
    return Trace(tuple(ids[:prompt]), tuple(ids[prompt:]))


def token_ids(trace: Trace) -> torch.Tensor:
    """LongTensor[1, T]: prompt and completion."""
    return torch.tensor([trace.prompt + trace.completion])
