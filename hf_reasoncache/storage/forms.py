"""The form in which keys and values are held: what a pool, or a segment, has of a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


class Form:
    """Keys and values as they come: two fields of those names.

    A store is given one form and holds whatever its `fields` answers, all of it moved, copied and
    freed together. Another form (fewer bits, one latent for both) overrides these methods. A form
    has no state, so that stores, copies and segments share it.
    """

    def fields(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turn new keys and values into what is held of them.

        Parameters
        ----------
        keys, values : Tensor[B, H_kv, T, D], Tensor[B, H_kv, T, D_v]

        Returns
        -------
        dict of str to Tensor[B, H_kv, T, ...]
            Of names that are no statistic's and not "positions". Not copied where they are held as
            they come.
        """
        return {"keys": keys, "values": values}

    def read(self, name: str, take: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Turn what is held of some tokens back, for scorers, reports and whoever reads a cache.

        Parameters
        ----------
        name : {"keys", "values"}
        take : Callable[[str], Tensor[..., *]]
            Copies a field of the tokens by its name.

        Returns
        -------
        Tensor[..., D]
            In the model's type.
        """
        return take(name)

    def operands(self, fields: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what attention reads of fields, each `Tensor[slots, ...]`, without copying any.

        Returns
        -------
        dict of str to Tensor[slots, ...]
            Arguments of `decode_attention` and `SharedPrefix`: "keys" and "values" at least.
        """
        return {"keys": fields["keys"], "values": fields["values"]}

    def of_latents(self, rank: int) -> Form:
        """Return the form of latents, with values of `rank` numbers, that goes with this one."""
        return LatentForm(rank)

    def query(self, query: torch.Tensor) -> torch.Tensor:
        """Return queries in the type in which they meet the operands; outputs are turned back."""
        return query

    def token_bytes(self, size: int, dtype: torch.dtype) -> int:
        """Bytes held per token and head, for keys of `size` numbers of the model's `dtype`."""
        return 2 * size * dtype.itemsize


AS_THEY_COME = Form()


@dataclass(frozen=True)
class LatentForm(Form):
    """One latent for the key and the value of a token (multi-head latent attention).

    A key is the latent with the rotary key behind it, and its first numbers are the value. They are
    held once. Queries and outputs are in the same space: the up-projection of the model is absorbed
    into them (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

    Attributes
    ----------
    rank : int
        Numbers of a value.
    """

    rank: int

    def fields(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Form.fields`; `values` are the first numbers of `keys`."""
        return {"latents": keys}

    def read(self, name: str, take: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """See `Form.read`."""
        latents = take("latents")
        return latents if name == "keys" else latents[..., : self.rank].contiguous()

    def operands(self, fields: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Form.operands`; values are a view, so that a kernel reads keys and values once."""
        latents = fields["latents"]
        return {"keys": latents, "values": latents[:, : self.rank]}

    def token_bytes(self, size: int, dtype: torch.dtype) -> int:
        """See `Form.token_bytes`."""
        return size * dtype.itemsize
