"""The least budget on attention whose spectrum is known, and on models."""

import pytest
import torch

from hf_reasoncache.experimental.lookup import least_budget
from hf_reasoncache.experimental.spectrum import least_tokens
from tests.support.models import build, prompt

TOKENS = 60


def attend(targets):
    """One head whose query at each position puts all its attention on one token."""
    return torch.nn.functional.one_hot(torch.tensor(targets), TOKENS).double()[None]


def least(attention, window=4, tolerance=0.05):
    positions = torch.arange(attention.shape[1])
    return int(least_tokens(attention, positions, window=window, tolerance=tolerance)[0])


def test_attention_to_one_token_or_to_the_last_ones_needs_almost_nothing():
    assert least(attend([0] * TOKENS)) == 4 + 3, "one direction"
    assert least(attend([max(0, t - 1) for t in range(TOKENS)])) == 4, "the window has it"


def test_look_up_needs_nearly_everything():
    # Every query of the second half reads a token of its own, and so does one in two of the first.
    flat = attend([t // 2 if t < 30 else t - 30 for t in range(TOKENS)])
    assert least(flat) == TOKENS
    few = attend([t % 5 for t in range(TOKENS)])
    assert least(few) == 4 + 3 * 5, "five tokens that are read again and again"


def test_tolerance_and_number_of_queries():
    mixed = attend([0] * 50 + [5 * t for t in range(10)])
    assert least(mixed, tolerance=0.5) < least(mixed, tolerance=0.01)


def test_arguments():
    attention = attend([0] * TOKENS)
    for positions, window, tolerance in [
        (torch.arange(3), 4, 0.1),
        (torch.arange(TOKENS), -1, 0.1),
        (torch.arange(TOKENS), 4, 0.0),
    ]:
        with pytest.raises(ValueError, match="least_tokens: expected"):
            least_tokens(attention, positions, window=window, tolerance=tolerance)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_a_row_in_a_padded_batch_is_the_row_alone(name):
    model, inputs = build(name), prompt(batch=3, tokens=40, padding=(0, 7, 16))
    found = least_budget(model, inputs, window=4)
    for row, pad in enumerate((0, 7, 16)):
        alone = {key: value[row : row + 1, pad:] for key, value in inputs.items()}
        assert least_budget(model, alone, window=4) == [found[row]]
        assert found[row].prompt == 40 - pad
        assert all(4 <= count <= 40 - pad for layer in found[row].heads for count in layer)
        assert found[row].looks_like_lookup == (found[row].budget > (40 - pad) / 2)
