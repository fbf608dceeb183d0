"""Readings of texts: against plain forwards in float64, across batches, kills and mistakes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.evaluation import parse_spec
from hf_reasoncache.evaluation.fidelity import (
    BLOCK,
    CHUNK,
    Piece,
    TextGrid,
    divergence,
    forwards,
    losses,
    pieces_of,
    read_texts,
    sum_up,
)
from hf_reasoncache.evaluation.specs import control
from hf_reasoncache.evaluation.statistics import Estimate
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import VOCABULARY, build
from tests.support.tokenizers import make_tokenizer

SPEC = parse_spec("rkv:prompt=evict", window=4, buffer=8)
TOKENS = 100


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def pieces() -> list[Piece]:
    ids = torch.randint(3, VOCABULARY, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    return [Piece(f"text/{n}", tuple(row)) for n, row in enumerate(ids.tolist())]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "readings.jsonl"


def test_losses_are_those_of_one_forward(model, pieces) -> None:
    ids = torch.tensor([piece.ids for piece in pieces])
    found = losses(ids, forwards(model, ids, ReasonAllocCache(model.config, budget=None)))
    with torch.no_grad():
        logs = model(ids).logits.log_softmax(-1)
    expected = -logs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected[:, CHUNK - 1 :], atol=1e-4, rtol=1e-4)


def test_divergence_is_torchs() -> None:
    first, second = torch.randn(2, 4, 5, 30, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.kl_div(
        second.double().log_softmax(-1), first.double().softmax(-1), reduction="none"
    ).sum(-1)
    torch.testing.assert_close(divergence(first, second).double(), expected, atol=1e-5, rtol=1e-4)


def test_a_reading_is_that_of_the_cache_alone(model, pieces, path: Path) -> None:
    """Each piece by itself, a forward per chunk, against one forward of the plain model."""
    grid = TextGrid(pieces, [SPEC], [24], controls=False)
    found = {each.key: each for each in read_texts(model, grid, path, progress=False)}
    assert len(found) == 6
    for piece in pieces:
        ids = torch.tensor([piece.ids])
        cache = SPEC.make(model.config, 24, None, 0)
        with torch.no_grad():
            plain = model(ids).logits[0].double()
            chunks = [
                model(ids[:, n : n + CHUNK], **cache_kwarg(cache)).logits[0]
                for n in range(0, TOKENS, CHUNK)
            ]
        squeezed = torch.cat(chunks).double()
        logs, other = plain.log_softmax(-1), squeezed.log_softmax(-1)
        reading = found[piece.name, SPEC.name, 24]
        counted = slice(CHUNK - 1, TOKENS - 1)
        kl = (logs.exp() * (logs - other)).sum(-1)[counted]
        loss = -other[:-1].gather(-1, ids[0, 1:, None])[:, 0][counted]
        same = (plain.argmax(-1) == squeezed.argmax(-1))[:-1]
        assert reading.sizes == [BLOCK, TOKENS - CHUNK - BLOCK]
        assert reading.divergences == pytest.approx([float(x.sum()) for x in kl.split(BLOCK)], 1e-3)
        assert reading.losses == pytest.approx([float(x.sum()) for x in loss.split(BLOCK)], 1e-4)
        assert reading.agreed == [int(x.sum()) for x in same[counted].split(BLOCK)]
        assert reading.until == int((~same).nonzero()[0]) + 1 < TOKENS
        assert reading.held == pytest.approx(cache.report().mean_held) and reading.evicted > 0
        full = found[piece.name, "full", None]
        assert (full.until, full.held, full.evicted) == (TOKENS, TOKENS, 0)
        assert sum(full.divergences) == 0 and sum(full.agreed) == TOKENS - CHUNK


def test_a_budget_beyond_the_text_costs_nothing(model, pieces, path: Path) -> None:
    rows = sum_up(read_texts(model, TextGrid(pieces, [SPEC], [24, 400], controls=False), path), {})
    full, small, large = rows
    assert large.nothing_evicted and not small.nothing_evicted
    assert large.divergence.value < 1e-6 < 0.01 < small.divergence.value
    assert (large.never, large.agreement, large.until) == (3, 1.0, TOKENS)
    assert small.loss.value - full.loss.value == pytest.approx(small.above_full.value)
    assert full.above_full is None and small.above_control is None


def test_batches_and_kills_change_nothing(model, pieces, path: Path) -> None:
    grid = TextGrid(
        pieces, [SPEC, parse_spec("sliding-window:prompt=evict,window=8,recent=8")], [24, 32]
    )
    assert [(spec.name, budget) for spec, budget in grid.cells[1:5]] == [
        ("rkv:prompt=evict", 24),
        ("sliding-window:prompt=evict,window=8,recent=8", 24),
        ("random:prompt=evict", 24),
        ("sliding-window:scorer=random,prompt=evict,window=8,recent=8", 24),
    ]
    found = read_texts(model, grid, path)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 1 + 3 * 9
    again = path.with_name("again.jsonl")
    # Killed within the last line of the first batch of one piece.
    some = replace(grid, pieces=pieces[:1])
    read_texts(model, some, again)
    again.write_bytes(again.read_bytes()[:-9])
    other = read_texts(model, replace(grid, batch_size=2), again)
    assert [each.key for each in other] == [each.key for each in found]
    for one, two in zip(found, other, strict=True):
        assert one.losses == pytest.approx(two.losses, abs=1e-3), "a row is read as it is alone"
        assert (one.until, one.agreed, one.held) == (two.until, two.agreed, two.held)
    lines = again.read_bytes()
    assert read_texts(model, grid, again) == other and again.read_bytes() == lines
    assert model.config._attn_implementation == "reasoncache"


def test_differences_are_paired(model, pieces, path: Path) -> None:
    grid = TextGrid(pieces, [SPEC], [24])
    rows = sum_up(read_texts(model, grid, path), {SPEC.name: control(SPEC).name})
    full, rkv, random = rows
    assert random.above_control is None
    assert rkv.above_control.value == pytest.approx(rkv.loss.value - random.loss.value)
    assert rkv.above_control.low < rkv.above_control.value < rkv.above_control.high
    assert full.loss.exp().value == pytest.approx(math.exp(full.loss.value))


def test_other_texts_and_settings_under_the_same_name(model, pieces, path: Path) -> None:
    grid = TextGrid(pieces, [SPEC], [24], controls=False)
    read_texts(model, grid, path)
    with pytest.raises(ValueError, match="differs in chunk"):
        read_texts(model, replace(grid, chunk=4), path)
    swapped = [replace(each, ids=each.ids[::-1]) for each in pieces]
    with pytest.raises(ValueError, match="'text/0' with 'full' to be of the same text"):
        read_texts(model, replace(grid, pieces=swapped), path)
    with pytest.raises(ValueError, match=r"'rkv:prompt=evict' at 4: .*budget"):
        read_texts(model, replace(grid, budgets=[4]), path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": []}, "budgets: expected at least one"),
        ({"specs": [SPEC, SPEC]}, "caches: expected at least one, and no two alike"),
        ({"pieces": [Piece("a", (1,) * 8)]}, "of more than a chunk of 8 tokens, .* got \\[8\\]"),
        ({"pieces": [Piece("a", (1,) * 9), Piece("b", (1,) * 10)]}, "all of one length"),
        ({"chunk": 0}, "chunk: expected an integer >= 1"),
    ],
    ids=str,
)
def test_grids_that_say_nothing(pieces, changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TextGrid(pieces, [SPEC], [24]), **changes)


def test_controls_keep_all_but_the_scorer() -> None:
    assert control(parse_spec("rkv")).name == "random"
    made = control(parse_spec("reason-alloc:scorer=h2o,profile=x,prompt=evict"))
    assert (made.name, made.scorer) == ("random:profile=x,prompt=evict", "random")
    assert made.settings == parse_spec("random:profile=x,prompt=evict").settings
    made = control(parse_spec("sliding-window:ratio=0.3"))
    assert made.name == "sliding-window:scorer=random,ratio=0.3"
    assert control(parse_spec("random")).name == "random"


def test_pieces_of_a_file(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "text.txt", make_tokenizer()
    path.write_text("0123456789" * 5)
    found = pieces_of(path, tokenizer, 16)
    assert [each.name for each in found] == ["text.txt/0", "text.txt/1", "text.txt/2"]
    start = tokenizer.bos_token_id
    assert all(len(each.ids) == 16 and each.ids[0] == start for each in found)
    read = [token for each in found for token in each.ids[1:]]
    assert tokenizer.decode(read) == ("0123456789" * 5)[:45]
    assert pieces_of(path, tokenizer, 16, most=1) == found[:1]
    with pytest.raises(ValueError, match="expected text of 60 tokens or more, got 51"):
        pieces_of(path, tokenizer, 60)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="expected text in UTF-8"):
        pieces_of(path, tokenizer, 16)


def test_an_interval_of_independent_blocks_is_the_usual_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() + 1
    found = Estimate.of_blocks((10 * values).tolist(), [10] * 400)
    width = 1.96 * float(values.std()) / 20
    assert found.value == pytest.approx(float(values.mean()))
    assert found.high - found.value == pytest.approx(width, rel=0.1)
    assert found.value - found.low == pytest.approx(width, rel=0.1)
    weighted = Estimate.of_blocks([6.0, 1.0], [3, 1])
    assert (weighted.value, weighted.low, weighted.high) == (7 / 4, 1.0, 2.0)
    assert str(weighted) == "+1.750 (+1.000, +2.000)"
