"""Steps of a chain of thought: cut, compared, and moved to other positions."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from examples.tiny_reasoner import MODELS, make_problems
from hf_reasoncache.experimental.rotation import Rotation
from hf_reasoncache.experimental.steps import (
    Boundaries,
    Step,
    StepSegmenter,
    lexical_similarity,
    segment,
)
from hf_reasoncache.releases import cache_kwarg
from tests.support.models import build


class Letters:
    """A tokenizer of one token per character of a text, or of two characters where it says so."""

    pieces = ("a", "b", "\n", "\n\n", ". ", "W", "ait", "\n\n\n")

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


IDS = st.lists(st.integers(0, len(Letters.pieces) - 1), max_size=40)


@given(IDS, st.integers(1, 3), st.integers(3, 6))
def test_steps_tile_the_text_and_end_where_they_may(ids, minimum, maximum):
    boundaries = Boundaries((r"\n\n", "Wait"), minimum=minimum, maximum=maximum)
    steps = segment(Letters(), ids, boundaries)
    starts = [0, *(step.stop for step in steps)]
    for start, step in zip(starts, steps, strict=False):
        assert step.start == start and step.ids == tuple(ids[start : step.stop])
        assert minimum <= len(step.ids) <= maximum
        text = Letters().decode(step.ids)
        ends_at_boundary = "\n\n" in text or "Wait" in text
        assert ends_at_boundary or len(step.ids) == maximum
    rest = ids[starts[-1] :]
    assert len(rest) < maximum


@given(IDS)
def test_without_limits_boundaries_are_those_of_the_whole_text(ids):
    """Every step but the last token of it holds no boundary; with it, one."""
    for step in segment(Letters(), ids, Boundaries((r"\n\n",), look_back=40)):
        assert "\n\n" in Letters().decode(step.ids)
        assert "\n\n" not in Letters().decode(step.ids[:-1])


def test_tokens_may_be_boundaries_by_themselves():
    segmenter = StepSegmenter(Letters(), Boundaries((), tokens=(4,)), start=7)
    found = [segmenter.push(token) for token in (0, 1, 4, 4, 0)]
    assert [(step.start, step.stop) for step in found if step] == [(7, 10), (10, 11)]


def test_the_tiny_reasoners_steps_are_its_sentences():
    tokenizer = AutoTokenizer.from_pretrained(MODELS["llama"])
    solution = make_problems("chain", 1, 1999, "llama")[0].solution
    ids = tokenizer(solution)["input_ids"]
    steps = segment(tokenizer, ids, Boundaries((r"\.",)))
    assert len(steps) == solution.split().count(".") > 10
    assert all(tokenizer.decode(step.ids).endswith(".") for step in steps)


@given(IDS.filter(len), IDS.filter(len))
def test_similarity_is_the_cosine_of_count_vectors(one, other):
    vectors = [torch.bincount(torch.tensor(ids), minlength=8).double() for ids in (one, other)]
    expected = float(torch.nn.functional.cosine_similarity(*vectors, dim=0))
    steps = [Step(0, len(ids), tuple(ids)) for ids in (one, other)]
    assert lexical_similarity(*steps) == pytest.approx(expected)
    shuffled = random.Random(0).sample(one, len(one))
    assert lexical_similarity(steps[0], Step(0, len(one), tuple(shuffled))) == pytest.approx(1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_a_moved_key_is_the_one_the_model_computes_there(name):
    """Keys of the first layer depend on token and position alone, so shift the positions."""
    model = build(name, "sdpa")
    rotation = Rotation(model)
    ids = torch.randint(3, 90, (2, 9))

    def keys(offset):
        cache = DynamicCache(config=model.config)
        positions = torch.arange(9)[None].expand(2, -1) + offset
        model(ids, position_ids=positions, **cache_kwarg(cache))
        return cache.layers[0].keys

    there = keys(31)
    torch.testing.assert_close(rotation.move(keys(0), 31), there, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotation.move(there, -31), keys(0), atol=1e-5, rtol=1e-5)
    offsets = torch.tensor([31] * 9)[None].expand(2, -1).clone()
    offsets[1] = 0
    moved = rotation.move(keys(0), offsets)
    torch.testing.assert_close(moved[0], there[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved[1], keys(0)[1], atol=1e-5, rtol=1e-5)
    half = rotation.move(keys(0).bfloat16(), 31)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), there, atol=0.05, rtol=0.05)


def test_yarn_scales_a_key_once():
    model = build("llama", "sdpa")
    config = model.config
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    embedding = type(model.model.rotary_emb)(config)
    assert embedding.attention_scaling != 1
    model.model.rotary_emb = embedding
    ids = torch.randint(3, 90, (1, 9))
    found = []
    for offset in (0, 50):
        cache = DynamicCache(config=config)
        model(ids, position_ids=torch.arange(9)[None] + offset, **cache_kwarg(cache))
        found.append(cache.layers[0].keys)
    moved = Rotation(model).move(found[0], 50)
    torch.testing.assert_close(moved, found[1], atol=1e-4, rtol=1e-4)


def test_what_cannot_be_rotated_is_refused():
    with pytest.raises(ValueError, match=r"one rotary embedding for all layers|position_ids"):
        Rotation(build("gemma3", "sdpa"))
    model = build("llama", "sdpa")
    assert "dynamic" in ROPE_INIT_FUNCTIONS
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="angles change with the length"):
        Rotation(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(patterns=()), "patterns or tokens"),
        (dict(patterns=r"\n"), "patterns or tokens"),
        (dict(patterns=("(",)), "regular expressions"),
        (dict(minimum=0), "minimum"),
        (dict(minimum=5, maximum=4), "maximum"),
        (dict(look_back=0), "look_back"),
    ],
)
def test_boundaries_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Boundaries(**arguments)
