"""Keys and values, or latents, in 8 bits: e4m3 numbers, and scales for each token and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hf_reasoncache.storage.forms import Form
from triton_ops.fp8 import dequantise, quantise

SCALES = "scales"
"""Name of the field that holds the scales of a token: of its key before its value, or of both."""


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

    def of_latents(self, rank: int) -> Form:
        """See `Form.of_latents`.

        Raises
        ------
        ValueError
            If only keys or only values are to be held in 8 bits.
        """
        if len(self.quantised) == 1:
            raise ValueError(
                "storage: expected 'fp8' or None for a model with latents, which are keys and "
                f"values at once, got 'fp8-{self.quantised[0]}'; use 'fp8'."
            )
        return Fp8LatentForm(rank)

    def token_bytes(self, size: int, dtype: torch.dtype) -> int:
        """See `Form.token_bytes`."""
        saved = size * dtype.itemsize - (size + dtype.itemsize)
        return super().token_bytes(size, dtype) - len(self.quantised) * saved


@dataclass(frozen=True)
class Fp8LatentForm(Form):
    """A latent and its rotary key as codes of 8 bits, with one scale for both per token.

    e4m3 has an exponent for each number, so a scale of its own for the rotary part would help only
    where that is a thousand times as large as the latent (docs/fp8.md).

    Attributes
    ----------
    rank : int
        Numbers of a value, the first ones of a key; see `LatentForm`.
    """

    rank: int

    def fields(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Form.fields`; `values` are the first numbers of `keys`."""
        codes, scales = quantise(keys)
        return {"latents": codes, SCALES: scales[..., None]}

    def read(self, name: str, take: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """See `Form.read`."""
        codes, scales = take("latents"), take(SCALES)[..., 0]
        return dequantise(codes if name == "keys" else codes[..., : self.rank], scales)

    def operands(self, fields: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Form.operands`; values are a view."""
        codes, scales = fields["latents"], fields[SCALES][:, 0]
        held = {"keys": codes, "values": codes[:, : self.rank]}
        return held | dict.fromkeys(_ARGUMENTS.values(), scales)

    def token_bytes(self, size: int, dtype: torch.dtype) -> int:
        """See `Form.token_bytes`."""
        return size + dtype.itemsize


FORMS: Mapping[str, Form] = {
    "fp8": Fp8Form(),
    "fp8-keys": Fp8Form(("keys",)),
    "fp8-values": Fp8Form(("values",)),
}
"""Forms of fewer bits, by the name that users give them."""

_ARGUMENTS = {"keys": "key_scales", "values": "value_scales"}
"""What attention calls the scales of each."""
