"""The fingerprint tells weights apart, and nothing else."""

from __future__ import annotations

import copy
import hashlib
import math
import struct

import pytest
import torch
from torch import nn

from hf_reasoncache.profiles import fingerprint
from tests.support.models import BUILDERS, build


@pytest.mark.parametrize("name", BUILDERS)
def test_same_weights(name: str) -> None:
    model = build(name)
    assert fingerprint(model) == fingerprint(build(name))
    assert fingerprint(model) != fingerprint(build(name, seed=1))


def test_dtype_and_names_do_not_count() -> None:
    model = build("llama").to(torch.bfloat16)
    expected = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).float()) == expected
    assert fingerprint(nn.ModuleDict({"wrapper": model})) == expected
    # Rounding a float32 checkpoint while loading is rounding it here.
    full = build("llama")
    assert fingerprint(full) == fingerprint(copy.deepcopy(full).to(torch.bfloat16))


def test_shared_parameters_count_once() -> None:
    tied, untied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    tied[1] = tied[0]
    untied[0].load_state_dict(tied[0].state_dict())
    assert fingerprint(tied) == fingerprint(untied)


def test_storage_does_not_count() -> None:
    one, other = nn.Module(), nn.Module()
    weight = torch.randn(40, 50)
    one.weight, other.weight = nn.Parameter(weight), nn.Parameter(weight.T.contiguous().T)
    assert not other.weight.is_contiguous()
    assert fingerprint(one) == fingerprint(other)


def test_single_numbers_count() -> None:
    one, other = nn.Module(), nn.Module()
    one.scale, other.scale = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))
    assert fingerprint(one) != fingerprint(other)


def test_every_parameter_counts() -> None:
    model = build("llama")
    expected = fingerprint(model)
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.1)
        assert fingerprint(model) != expected, name
        with torch.no_grad():
            parameter.copy_(before)
    assert fingerprint(model) == expected


def test_layers_may_not_change_places() -> None:
    model = build("llama")
    expected = fingerprint(model)
    layers = model.model.layers
    layers[0], layers[2] = layers[2], layers[0]
    assert fingerprint(model) != expected


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 1000])
def test_what_is_hashed(size: int) -> None:
    """Done by hand: shape, then up to 256 evenly spaced values, as bfloat16."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(size))
    digest = hashlib.sha256(f"({size},)".encode())
    taken = min(size, 256)
    for index in range(taken):
        value = model.weight[math.floor(index * size / taken)].item()
        rounded = torch.tensor(value).bfloat16().item()
        # bfloat16 is the upper half of a float32.
        digest.update(struct.pack("<f", rounded)[2:])
    assert fingerprint(model) == "bf16-sample-256:" + digest.hexdigest()


def test_quantised_weights_are_hashed_as_they_are() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.arange(6, dtype=torch.uint8), requires_grad=False)
    digest = hashlib.sha256(b"(6,)" + bytes(range(6)))
    assert fingerprint(model) == "bf16-sample-256:" + digest.hexdigest()


def test_models_without_weights() -> None:
    with pytest.raises(ValueError, match="expected a model with parameters"):
        fingerprint(nn.Identity())
    with pytest.raises(ValueError, match=r"0\.weight on the meta device; load the model without"):
        fingerprint(nn.Sequential(nn.Linear(2, 2, device="meta")))
