"""Fair eviction as a choice: sums are exact, nothing forced goes, quotas follow length."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reasoncache.policies.keep_top import keep_top
from hf_reasoncache.protection import Fair, Protection, Spans
from hf_reasoncache.protection.fair import share_fairly


@st.composite
def cases(draw):
    """Two rows, two heads, some of 24 tokens held, some of those forced, budgets that hold them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, heads, tokens = 2, 2, 24

    def random(*shape):
        return torch.rand(*shape, generator=generator)

    valid = random(rows, heads, tokens) < draw(st.sampled_from([0.4, 0.8, 1.0]))
    forced = valid & (random(rows, heads, tokens) < draw(st.sampled_from([0.0, 0.2, 0.6])))
    # Ties are common in real scores.
    scores = (random(rows, heads, tokens) * draw(st.sampled_from([3, 1000]))).floor()
    scores = scores.masked_fill(forced, torch.inf).masked_fill(~valid, -torch.inf)
    budgets = forced.sum(-1) + (random(rows, heads) * 12).long()
    cuts = sorted({0, *draw(st.lists(st.integers(1, 23), max_size=5))})
    spans = torch.bucketize(torch.arange(tokens), torch.tensor(cuts), right=True) - 1
    spans = spans.expand(rows, heads, -1)
    lengths = torch.tensor([*cuts, tokens]).diff().expand(rows, -1)
    return valid, forced, scores, budgets, spans, lengths


@settings(max_examples=150)
@given(cases(), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_quotas(case, strength):
    valid, forced, scores, budgets, spans, lengths = case
    default = keep_top(scores, budgets) & valid
    keep = share_fairly(default, scores, valid, forced, spans, lengths, strength)
    assert torch.equal(keep.sum(-1), default.sum(-1)), "sums are exact"
    assert not (keep & ~valid).any() and not (forced & ~keep).any()
    if strength == 0.0:
        assert torch.equal(keep, default)
    number = lengths.shape[1]
    for row, head in [(0, 0), (1, 1)]:
        of = [spans[row, head] == s for s in range(number)]
        count = {
            name: torch.tensor([int(mask[row, head][own].sum()) for own in of])
            for name, mask in dict(k=keep, d=default, f=forced, v=valid).items()
        }
        free = valid[row, head] & ~forced[row, head]
        for own in of:
            kept = scores[row, head][own & free & keep[row, head]]
            gone = scores[row, head][own & free & ~keep[row, head]]
            if len(kept) and len(gone):
                assert kept.min() >= gone.max(), "the best of every span"
        if strength == 1.0:
            # Proportional to length, wherever neither bound is in the way.
            rate = count["k"] / lengths[row]
            loose = (count["k"] > count["f"]) & (count["k"] < count["v"])
            for s in loose.nonzero()[:, 0]:
                for t in loose.nonzero()[:, 0]:
                    slack = 1 / lengths[row, s] + 1 / lengths[row, t]
                    assert abs(rate[s] - rate[t]) <= slack + 1e-9
        else:
            fair = share_fairly(default, scores, valid, forced, spans, lengths, 1.0)
            fair = torch.tensor([int(fair[row, head][own].sum()) for own in of])
            mixed = (1 - strength) * count["d"] + strength * fair
            assert ((count["k"] - mixed).abs() < 1 + 1e-6).all(), "between default and fair"


def test_a_span_that_scores_nothing_keeps_its_share():
    scores = torch.tensor([9.0] * 6 + [1.0] * 6).view(1, 1, 12)
    valid = torch.ones(1, 1, 12, dtype=torch.bool)
    spans = torch.tensor([0] * 6 + [1] * 6).view(1, 1, 12)
    default = keep_top(scores, torch.tensor([[6]]))
    kept = [
        share_fairly(default, scores, valid, ~valid, spans, torch.tensor([[6, 6]]), strength)
        .view(2, 6)
        .sum(-1)
        .tolist()
        for strength in (0.0, 0.5, 1.0)
    ]
    assert kept[0] == [6, 0] and kept[2] == [3, 3]
    assert kept[1] in ([5, 1], [4, 2]), "4.5 and 1.5"


def test_spans_cover_the_text():
    fair = Fair(1.0, spans=[(3, 5), (9, 20)], window=4)
    assert fair.cuts(0, 22) == [0, 3, 5, 9, 20]
    assert Fair(1.0, window=4).cuts(0, 10) == [0, 4, 8]
    assert fair.cuts(0, 10) == [0, 3, 5, 9], "of a prompt that is not complete"
    assert Fair(1.0, spans=[[(0, 4)], [(4, 6)]], window=8).cuts(1, 6) == [0, 4]


@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 9), st.integers(0, 2))
def test_every_position_has_a_span_and_spans_have_their_length(prompt, generated, window, ranges):
    spans = [(0, 3), (5, 6)][:ranges] or None
    if spans and prompt < 6:
        return
    protection = Protection(fair=Fair(1.0, spans, window)).for_rows(torch.tensor([prompt]))
    length = prompt + generated
    positions = torch.arange(length).view(1, 1, -1)
    held = torch.ones_like(positions, dtype=torch.bool)
    scores = torch.arange(length).float().view(1, 1, -1)
    keep = keep_top(scores, torch.tensor([[max(1, length // 2)]]))
    found = protection.rebalance(torch.tensor([0]), positions, keep, scores, held, ~held)
    assert found.sum() == keep.sum()
    cuts = [*Fair(1.0, spans, window).cuts(0, prompt), *range(prompt, length, window), length]
    for begin, end in pairwise(cuts):
        share = float(found[0, 0, begin:end].sum()) / (end - begin)
        assert abs(share - max(1, length // 2) / length) <= 1 / (end - begin) + 1e-6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(strength=1.5), "expected a number from 0 to 1, got 1.5"),
        (dict(strength=True), "got True"),
        (dict(strength="all"), "got 'all'"),
        (dict(strength=0.5, window=0), "window as an integer >= 1, got 0"),
        (
            dict(strength=0.5, spans=[(0, 5), (4, 9)]),
            r"do not overlap, got \(0, 5\) and one from 4",
        ),
        (dict(strength=0.5, spans="ab"), "expected Spans, token ranges"),
    ],
    ids=repr,
)
def test_bad_settings(arguments, said):
    with pytest.raises(ValueError, match=said):
        Fair(**arguments)


def test_whitelist_counts_and_covers():
    protection = Protection(keep=Spans.of([[(2, 4), (3, 6), (8, 9)], []])).for_rows(
        torch.tensor([10, 7, 5, 5])
    )
    assert protection.count.tolist() == [5, 5, 0, 0]
    positions = torch.arange(-1, 10).view(1, 1, -1)
    assert protection.covers(torch.tensor([1]), positions)[0, 0].nonzero()[:, 0].tolist() == [
        3,
        4,
        5,
        6,
        9,
    ]
    assert not protection.covers(torch.tensor([2]), positions).any()
    swapped = protection.select_rows(torch.tensor([3, 0]))
    assert swapped.count.tolist() == [0, 5] and swapped.prompt.tolist() == [5, 10]
    below = protection.count_below(torch.tensor([3, 9, 4, 0]))
    assert below.tolist() == [1, 5, 0, 0]
