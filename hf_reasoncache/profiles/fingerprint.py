"""Whether two models have the same weights, told from a sample of them."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SCHEME = "bf16-sample-256"
"""Names what is hashed, so that a change of it is not taken for a change of the weights."""

_SAMPLE = 256


def fingerprint(model: nn.Module) -> str:
    """Hash the shapes of all parameters and up to 256 evenly spaced values of each.

    The parameters come in the order in which the modules were registered, a shared one once; their
    names do not count, so neither a wrapper's prefix nor a renaming between releases of
    transformers changes the result. Values are rounded to bfloat16: a checkpoint in float32 or
    bfloat16 gives the same fingerprint in either, on any device. float16 overflows and loses
    small values, and quantised weights are other weights: both may give another fingerprint, as do
    adapters. Fine-tuning that leaves every sampled value as it was is not seen; a 7B model of 290
    parameters has some 70,000 sampled values.

    Parameters
    ----------
    model : nn.Module
        All of its parameters must hold data. Costs one small gather and copy per parameter, a few
        milliseconds per billion weights.

    Returns
    -------
    str
        `SCHEME`, a colon, and 64 hexadecimal digits of SHA-256.

    Raises
    ------
    ValueError
        If the model has no parameter, or one without data.
    """
    digest = hashlib.sha256()
    count = 0
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"fingerprint: expected weights with data, got {name} on the meta device; load the "
                "model without offloading."
            )
        digest.update(repr(tuple(parameter.shape)).encode())
        digest.update(_sampled(parameter.detach()))
        count += 1
    if not count:
        raise ValueError("fingerprint: expected a model with parameters, got one without.")
    return f"{SCHEME}:{digest.hexdigest()}"


def _sampled(weights: torch.Tensor) -> bytes:
    taken = min(_SAMPLE, weights.numel())
    at = torch.arange(taken, device=weights.device) * weights.numel() // max(taken, 1)
    # Not flattened first: that would copy weights that are stored transposed.
    sample = weights[torch.unravel_index(at, weights.shape)] if weights.dim() else weights[None]
    if sample.is_floating_point():
        sample = sample.to(torch.bfloat16)
    return bytes(sample.cpu().view(torch.uint8).tolist())
