"""Semantic sharing: exact for equal prompts, its error measured for others, off where slow."""

import math

import pytest
import torch
from transformers import DynamicCache

from hf_reasoncache.experimental.semantic import (
    SharingGate,
    layer_weights,
    semantic_prefill,
    semantic_similarity,
)
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import build

PROBE = 5


def prompts(*changes):
    """Copies of one prompt; each change replaces tokens of a row."""
    root = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(0))
    rows = root.repeat(1 + len(changes), 1)
    for row, columns in enumerate(changes, 1):
        for column in columns:
            rows[row, column] = (rows[row, column] + 40) % 90 + 3
    return rows


def test_similarity_is_the_weighted_cosine():
    assert float(layer_weights(7).sum()) == pytest.approx(1)
    assert float(layer_weights(4)[3] / layer_weights(4)[0]) == pytest.approx(math.exp(1.5 * 3 / 4))
    states, root = torch.randn(3, 4, 8), torch.randn(4, 8)
    for row, found in enumerate(semantic_similarity(states, root)):
        weights = [math.exp(1.5 * layer / 4) for layer in (1, 2, 3, 4)]
        cosines = [
            float(states[row, i] @ root[i] / states[row, i].norm() / root[i].norm())
            for i in range(4)
        ]
        expected = sum(w * c for w, c in zip(weights, cosines, strict=True)) / sum(weights)
        assert float(found) == pytest.approx(expected, abs=1e-5)


def test_equal_prompts_share_without_error():
    model = build("llama")
    ids = prompts((), ())
    found = semantic_prefill(model, ids, probe=PROBE)
    assert found.shared.tolist() == [True] * 3
    torch.testing.assert_close(found.similarity, torch.ones(3))
    assert float(found.divergence.max()) < 1e-6 and not found.changed.any()
    arguments = dict(do_sample=False, max_new_tokens=12)
    out = model.generate(ids, **cache_kwarg(found.cache), **arguments)
    assert torch.equal(out, model.generate(ids, **arguments))


def test_a_row_that_shares_reads_the_roots_prefix():
    """Against a forward over the root's prefix and the row's own end."""
    model = build("llama")
    ids = prompts((2, 7), (21, 22))
    found = semantic_prefill(model, ids, tau=-1.0, probe=PROBE)
    assert found.shared.all() and float(found.similarity[0]) == pytest.approx(1)
    # The first row differs before its probe only, so its probe cannot tell; the second one's can.
    assert float(found.similarity[1]) == pytest.approx(1)
    assert float(found.similarity[2]) < 0.99
    mixed = ids.clone()
    mixed[:, : 24 - 1 - PROBE] = ids[0, : 24 - 1 - PROBE]
    exact, read = (model(x[:, :-1]).logits[:, -1].log_softmax(-1) for x in (ids, mixed))
    divergence = (exact.exp() * (exact - read)).sum(-1)
    torch.testing.assert_close(found.divergence, divergence.detach(), atol=1e-5, rtol=1e-4)
    assert float(found.divergence[1]) > 0.01  # a similarity of 1 proves nothing
    torch.testing.assert_close(found.divergence[2], torch.zeros(()), atol=1e-5, rtol=0)
    arguments = dict(do_sample=False, max_new_tokens=8)
    out = model.generate(ids, **cache_kwarg(found.cache), **arguments)
    cache = DynamicCache(config=model.config)
    model(mixed[:, :-1], **cache_kwarg(cache))
    expected = model.generate(ids, **cache_kwarg(cache), **arguments)
    assert torch.equal(out, expected)


def test_rows_below_the_threshold_are_left_out():
    model = build("llama")
    ids = prompts((21, 22), ())
    between = float(semantic_prefill(model, ids, tau=-1.0, probe=PROBE).similarity[1]) + 0.01
    found = semantic_prefill(model, ids, tau=between, probe=PROBE)
    assert found.shared.tolist() == [True, False, True]
    assert found.divergence[1].isnan() and not found.changed[1]
    out = model.generate(ids[found.shared], **cache_kwarg(found.cache), max_new_tokens=6)
    assert torch.equal(out[0], out[1])
    quiet = semantic_prefill(model, ids, tau=between, probe=PROBE, measure=False)
    assert quiet.divergence is None and quiet.changed is None


@pytest.mark.parametrize(("ticks", "pays"), [((0, 1, 1, 3), True), ((0, 2, 2, 3), False)])
def test_the_gate_times_a_length_once(ticks, pays):
    model, ids = build("llama"), prompts(())
    clock = iter(ticks)
    gate = SharingGate(clock=lambda: next(clock))
    found = semantic_prefill(model, ids, probe=PROBE, gate=gate)
    assert gate.verdict(24) is pays and gate.verdict(63) is pays and gate.verdict(64) is None
    assert (found.cache is not None) is pays and bool(found.shared.any()) is pays
    gate.clock = lambda: 0.0
    again = semantic_prefill(model, ids, probe=PROBE, gate=gate)
    assert (again.cache is not None) is pays


def test_arguments_are_checked():
    model, ids = build("llama"), prompts(())
    with pytest.raises(ValueError, match="at least 25 tokens"):
        semantic_prefill(model, ids, probe=23)
    with pytest.raises(ValueError, match="probe: expected"):
        semantic_prefill(model, ids, probe=0)
    with pytest.raises(ValueError, match="tau: expected"):
        semantic_prefill(model, ids, tau=1.5)
