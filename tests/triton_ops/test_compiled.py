"""Every kernel compiles for sm_80 and sm_90 in the sizes of real models, within their limits."""

import pytest
import torch

from triton_ops.backend import interpreting
from triton_ops.layout import RaggedLayout

pytestmark = pytest.mark.skipif(
    interpreting(), reason="TRITON_INTERPRET=1 replaces the kernels by Python"
)

BATCH, KV_HEADS, CAPACITY = 2, 8, 1152


def pool(dtype, head_size):
    layout = RaggedLayout(torch.full((BATCH, KV_HEADS), CAPACITY))
    keys, values = (torch.empty(layout.slots, head_size, dtype=dtype) for _ in range(2))
    return keys, values, torch.empty(layout.slots, dtype=torch.int32), layout, layout.capacity


def decode(dtype, head_size, group, steps=1, extras=False):
    """Launch what `decode_attention` launches, with or without all that is optional."""
    from triton_ops.decode_attention.kernel import decode_attention_triton

    keys, values, positions, layout, length = pool(dtype, head_size)
    decode_attention_triton(
        torch.empty(BATCH, KV_HEADS, group, steps, head_size, dtype=dtype),
        keys,
        values,
        positions,
        layout,
        length,
        query_positions=None if steps == 1 else torch.empty(BATCH, steps, dtype=torch.long),
        scaling=head_size**-0.5,
        softcap=30.0 if extras else None,
        s_aux=torch.empty(KV_HEADS * group, dtype=dtype) if extras else None,
        mass=torch.empty(layout.slots) if extras else None,
        mass_weight=torch.empty(steps) if extras else None,
        logsumexp=None,
    )


# What is launched, and how many programs of each kernel must fit one multiprocessor: two wherever
# latency has to be hidden, one where a single program fills it.
CASES = {
    "decode: Llama 8B": (2, lambda: decode(torch.bfloat16, 128, 4)),
    "decode: Qwen3 14B": (2, lambda: decode(torch.bfloat16, 128, 5)),
    "decode: GPT-OSS": (2, lambda: decode(torch.bfloat16, 64, 8, extras=True)),
    "decode: Phi-3 mini": (2, lambda: decode(torch.bfloat16, 96, 1)),
    "decode: Gemma 3": (2, lambda: decode(torch.bfloat16, 256, 2)),
    "decode: float16, all extras": (2, lambda: decode(torch.float16, 128, 4, extras=True)),
    "decode: float32, all extras": (2, lambda: decode(torch.float32, 128, 4, extras=True)),
    "draft of 8": (1, lambda: decode(torch.bfloat16, 128, 4, steps=8)),
    "second turn": (1, lambda: decode(torch.bfloat16, 128, 4, steps=64, extras=True)),
    "second turn: size 256": (1, lambda: decode(torch.bfloat16, 256, 4, steps=64)),
    "second turn: float32": (1, lambda: decode(torch.float32, 256, 4, steps=64, extras=True)),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_it_compiles_within_limits(name, capability, tmp_path):
    from tests.triton_ops.offline import SHARED_MEMORY, Binary, compiling

    programs, launch = CASES[name]
    with compiling(capability) as kernels:
        launch()
    binaries = [Binary.of(kernel, tmp_path) for kernel in kernels]
    assert binaries
    for binary in binaries:
        assert binary.stack == binary.local == 0, f"registers are spilled: {binary}"
        assert binary.shared < SHARED_MEMORY[capability], str(binary)
        assert binary.programs(capability) >= programs, str(binary)
