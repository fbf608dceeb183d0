"""Numbers in codes of 8 bits, and the pools of other cases in them."""

from dataclasses import replace

import torch

from triton_ops.backend import use_backend
from triton_ops.fp8 import quantise

PARTS = [("keys", "values"), ("keys",), ("values",)]
"""What of a pool is held in codes."""

_SCALES = {"keys": "key_scales", "values": "value_scales"}


def rows(dtype, size=40, seed=0):
    """Rows of many magnitudes, `[2, 3, 17, size]`: one of zeros, some with a few large numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 17, size, generator=generator)
    x *= torch.randn(2, 3, 17, 1, generator=generator).mul(2).exp()
    x[0, 0, 0] = 0
    x[1, :, :, : size // 2] *= 1e-3
    return x.to(dtype)


def in_codes(case, parts):
    """A pool whose `parts` are codes, the same in float64, and the arguments that go with it.

    What attention reads of the pool is made by `quantise`; the numbers in float64 come from
    PyTorch's own type.
    """
    made = {}
    with use_backend("torch"):
        for name in parts:
            codes, scales = quantise(getattr(case, name)[None, None].nan_to_num(0.0))
            made[name] = codes[0, 0], scales[0, 0]
    # As a pool holds them: columns of one field.
    field = torch.stack([scales for _, scales in made.values()], -1)
    columns = {_SCALES[name]: field[:, place] for place, name in enumerate(made)}
    whole = {
        name: codes.view(torch.float8_e4m3fn).double() * scales.double()[:, None]
        for name, (codes, scales) in made.items()
    }
    held = {name: codes for name, (codes, _) in made.items()}
    doubles = {
        name: getattr(case, name).double()
        for name in ("query", "keys", "values")
        if hasattr(case, name)
    }
    return replace(case, **held), replace(case, **doubles | whole), columns


def latents_in_codes(case, first, device="cpu"):
    """`in_codes` where values are the `first` numbers of keys; the pool on a device, not copied."""
    held, whole, scales = in_codes(case, ("keys",))
    keys, scale = held.keys.to(device), scales["key_scales"].to(device)
    return (
        replace(held, keys=keys, values=keys[:, :first]),
        replace(whole, values=whole.keys[:, :first]),
        dict.fromkeys(_SCALES.values(), scale),
    )
