"""Attention that this machine has not."""

import pytest
import torch


@pytest.fixture
def fake_flash(monkeypatch):
    """Flash attention is no part of a CPU machine: one that behaves like it where we touch it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def flash(module, query, key, value, attention_mask, *, scaling, dropout=0.0, **kwargs):
        # transformers loads the kernel that this name stands for.
        calls.append(module.config._attn_implementation)
        steps = query.shape[2]
        seen = torch.ones(steps, key.shape[2], dtype=torch.bool).tril(key.shape[2] - steps)
        seen = seen[None, None]
        if attention_mask is not None:
            assert attention_mask.dim() == 2, "flash attention takes the padding mask"
            seen = seen & attention_mask[:, None, None, -key.shape[2] :].bool()
        group = query.shape[1] // key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            attn_mask=seen,
            scale=scaling,
        )
        return out.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    assert "flash_attention_2" in ALL_MASK_ATTENTION_FUNCTIONS
    return calls
