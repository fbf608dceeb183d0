"""Keys and values in 8 bits: e4m3 numbers, and a scale for each token and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hf_reasoncache.storage.forms import Form
from triton_ops.fp8 import dequantise, quantise

SCALES = "scales"
"""Name of the field that holds the scales of a token, those of its key before its value's."""


@dataclass(frozen=True)
class Fp8Form(Form):
    """Keys, values or both as codes of 8 bits, with a scale per token and head in the model's type.

    Attributes
    ----------
    quantised : tuple of str
        What is held in 8 bits: "keys", "values" or both, in this order. The rest stays as it comes.
    """

    quantised: tuple[str, ...] = ("keys", "values")

    def fields(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Form.fields`."""
        held, scales = {"keys": keys, "values": values}, []
        for name in self.quantised:
            held[name], scale = quantise(held[name])
            scales.append(scale)
        # One field for both: compactions move words of the size of the smallest field.
        return {**held, SCALES: torch.stack(scales, -1)}

    def read(self, name: str, take: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """See `Form.read`."""
        found = take(name)
        if name not in self.quantised:
            return found
        return dequantise(found, take(SCALES)[..., self.quantised.index(name)])

    def operands(self, fields: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Form.operands`."""
        scales = zip(self.quantised, fields[SCALES].unbind(-1), strict=True)
        return super().operands(fields) | {_ARGUMENTS[name]: scale for name, scale in scales}

    def token_bytes(self, size: int, dtype: torch.dtype) -> int:
        """See `Form.token_bytes`."""
        saved = size * dtype.itemsize - (size + dtype.itemsize)
        return super().token_bytes(size, dtype) - len(self.quantised) * saved


FORMS: Mapping[str, Form] = {
    "fp8": Fp8Form(),
    "fp8-keys": Fp8Form(("keys",)),
    "fp8-values": Fp8Form(("values",)),
}
"""Forms of fewer bits, by the name that users give them."""

_ARGUMENTS = {"keys": "key_scales", "values": "value_scales"}
"""What attention calls the scales of each."""
