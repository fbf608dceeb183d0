"""The damage of an eviction against attention written out in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reasoncache.risk import damage as module
from hf_reasoncache.risk import eviction_damage
from tests.support.attention_reference import outputs


def case(seed=0, dtype=torch.float64, rows=2, heads=3, group=2, asked=4, tokens=17, size=8):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    at = torch.arange(tokens).expand(rows, heads, -1).clone()
    at[1, 1, -3:] = -1
    asking = torch.arange(tokens - asked, tokens).expand(rows, -1).clone()
    asking[1, 0] = -1
    keep = torch.rand(rows, heads, tokens, generator=generator) < 0.5
    keep[..., 0] = True
    keys, values = normal(rows, heads, tokens, size) * 2, normal(rows, heads, tokens, 5)
    return dict(
        queries=normal(rows, heads, group, asked, size),
        query_positions=asking,
        keys=keys.masked_fill((at < 0)[..., None], 0),
        values=values.masked_fill((at < 0)[..., None], 0),
        key_positions=at,
        keeps=[keep],
    )


SETTINGS = [
    {},
    {"softcap": 1.5},
    {"s_aux": torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, -2.0]).double()},
]


@pytest.mark.parametrize("attention", SETTINGS, ids=lambda each: ",".join(each) or "plain")
@pytest.mark.parametrize("tile", [1, 1 << 20])
def test_equals_the_difference_of_outputs(attention, tile, monkeypatch):
    monkeypatch.setattr(module, "_TILE", tile)
    made = case()
    [found] = eviction_damage(**made, scaling=0.3, **attention)
    for row in range(2):
        for head in range(3):
            sinks = attention.get("s_aux")
            full, kept, mass = outputs(
                made["queries"][row, head],
                made["query_positions"][row],
                made["keys"][row, head],
                made["values"][row, head],
                made["key_positions"][row, head],
                made["keeps"][0][row, head],
                0.3,
                attention.get("softcap"),
                None if sinks is None else sinks.view(3, 2)[head],
            )
            real = made["query_positions"][row] >= 0
            error = (kept - full)[:, real]
            expected = {
                "mass": mass[:, real].mean(),
                "error": error.norm() / full[:, real].norm(),
                "worst": (error.norm(dim=-1) / full[:, real].norm(dim=-1)).max(),
            }
            for name, value in expected.items():
                torch.testing.assert_close(getattr(found, name)[row, head], value)


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_the_identity_and_the_bound(seed):
    """error = delta * (kept - evicted), hence at most delta times the diameter of the values."""
    made = case(seed)
    [found] = eviction_damage(**made, scaling=0.5)
    for row in range(2):
        for head in range(3):
            own = [made[name][row, head] for name in ("queries", "keys", "values")]
            at, keep = made["key_positions"][row, head], made["keeps"][0][row, head]
            queries, keys, values = own
            asked = made["query_positions"][row]
            full, kept, mass = outputs(queries, asked, keys, values, at, keep, 0.5)
            _, gone, _ = outputs(queries, asked, keys, values, at, ~keep, 0.5)
            some = (mass > 0) & (asked >= 0)
            difference = mass[..., None] * (kept - gone)
            torch.testing.assert_close((kept - full)[some], difference[some])
            held = values[at >= 0]
            diameter = torch.cdist(held, held).max()
            assert ((kept - full).norm(dim=-1) <= mass * diameter + 1e-12)[some].all()
            assert found.error[row, head] >= 0 and 0 <= found.mass[row, head] <= 1


def test_nothing_evicted_is_no_damage_and_half_precision_is_near():
    made = case(dtype=torch.bfloat16)
    everything = torch.ones_like(made["keeps"][0])
    none, some = eviction_damage(**(made | {"keeps": [everything, *made["keeps"]]}), scaling=0.3)
    for name in ("mass", "error", "worst"):
        assert not getattr(none, name).any()
        assert getattr(some, name).dtype == torch.float32
    # The same rounded numbers in double precision.
    exact = {
        name: x.double() if x.is_floating_point() else x
        for name, x in made.items()
        if name != "keeps"
    }
    [expected] = eviction_damage(**exact, keeps=made["keeps"], scaling=0.3)
    torch.testing.assert_close(some.error.double(), expected.error, atol=1e-5, rtol=1e-5)
