"""Each row draws from a stream of its own, by the probability of tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from hf_reasoncache.generation import Sampling
from hf_reasoncache.generation.sampling import OwnStreams


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, -3.0])
    sampling, draws = Sampling(temperature=2.0, top_k=4), 4000
    streams = OwnStreams(range(draws), 1, sampling)
    chosen = streams(torch.zeros(draws, 1, dtype=torch.long), logits.expand(draws, -1)).argmax(-1)
    found = chosen.bincount(minlength=5) / draws
    expected = (logits / 2).masked_fill(logits < -2, -torch.inf).softmax(-1)
    assert found[4] == 0
    # 4 standard deviations of the largest.
    assert (found - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_a_models_own_sampling_is_taken_or_refused() -> None:
    assert Sampling.of(GenerationConfig()) == Sampling(0.0)
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    assert Sampling.of(config) == Sampling(0.6, 20, 0.95)
    assert len(Sampling.of(config).warpers()) == 3
    with pytest.raises(ValueError, match="min_p: expected a generation config with"):
        Sampling.of(GenerationConfig(do_sample=True, min_p=0.1))
