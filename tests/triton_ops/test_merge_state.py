"""merge_state: attention to two sets of tokens, joined, is attention to both."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triton_ops.merge_state import merge_state


def attend(logits, values):
    """Softmax attention and its logsumexp; zeros and -inf without tokens."""
    if not logits.shape[-1]:
        return values.new_zeros(*logits.shape[:-1], values.shape[-1]), logits.logsumexp(-1)
    return logits.softmax(-1) @ values, logits.logsumexp(-1)


@given(tokens=st.integers(0, 9), cut=st.integers(0, 9), scale=st.sampled_from([1.0, 300.0]))
def test_two_parts_are_the_whole(tokens, cut, scale):
    generator = torch.Generator().manual_seed(tokens)
    logits = scale * torch.randn(2, 3, tokens, generator=generator, dtype=torch.float64)
    values = torch.randn(tokens, 4, generator=generator, dtype=torch.float64)
    parts = attend(logits[..., :cut], values[:cut]), attend(logits[..., cut:], values[cut:])
    merged = merge_state(*parts[0], *parts[1])
    torch.testing.assert_close(merged, attend(logits, values), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merge_state(*parts[1], *parts[0]), merged)


def test_types():
    out, lse = torch.randn(3, 4).bfloat16(), torch.randn(3)
    merged, total = merge_state(out, lse, out, lse)
    assert torch.equal(merged, out) and merged.dtype == torch.bfloat16
    torch.testing.assert_close(total, lse + math.log(2))


@pytest.mark.parametrize(
    "shapes", [((3, 4), (3,), (3, 5), (3,)), ((3, 4), (4,), (3, 4), (3,)), ((3, 4),) * 4]
)
def test_what_does_not_fit_is_refused(shapes):
    with pytest.raises(ValueError, match=r"expects two results \[\.\.\., D_v\]"):
        merge_state(*(torch.zeros(shape) for shape in shapes))
