"""The error of eviction, measured in chunks and many at once, against tokens one by one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from transformers import Cache, DynamicCache

from hf_reasoncache import ReasonAllocCache
from hf_reasoncache.cache import ReasonCache
from hf_reasoncache.calibration.sensitivity import Eviction
from hf_reasoncache.calibration.squeeze import divergence, output_error
from hf_reasoncache.calibration.traces import Trace
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.layer import CacheLayer
from hf_reasoncache.releases import cache_kwarg
from hf_reasoncache.scorers import H2O, RKV
from tests.support.models import BUILDERS, build, sliding_first
from tests.support.pairs import in_turn
from tests.support.traces import make_trace, token_ids

BUDGETS = (10, 14, 21, 27, 44)  # below the prompt, above it, and with every phase of the buffer


def everywhere(name: str, budgets: tuple[int, ...]) -> torch.Tensor:
    """LongTensor[R, L, H_kv]: the same budget in all layers and heads."""
    geometry = Geometry.of(build(name).config)
    shape = (-1, len(geometry.full_attention_layers), geometry.kv_heads)
    return torch.tensor(budgets)[:, None, None].expand(*shape)


def predictions(name: str, trace: Trace, cache: Cache, attention: str) -> torch.Tensor:
    """Log-probabilities [T, V] after every generated token but the last, one forward each."""
    ids, start, model = token_ids(trace), len(trace.prompt), build(name, attention)
    with torch.no_grad():
        model(ids[:, :start], **cache_kwarg(cache))
        logits = [
            model(ids[:, place : place + 1], **cache_kwarg(cache)).logits
            for place in range(start, trace.length - 1)
        ]
    return torch.cat(logits, 1)[0].double().log_softmax(-1)


@cache
def undisturbed(name: str, trace: Trace) -> torch.Tensor:
    """The predictions of the full cache, by the eager implementation."""
    return predictions(name, trace, DynamicCache(config=build(name).config), "eager")


def one_by_one(name: str, trace: Trace, eviction: Eviction, budget: int) -> float:
    """The same quantity from two generations' forwards, in float64 logarithms."""
    settings = dict(vars(eviction))
    protect = settings.pop("protect_prompt")
    evicting = ReasonAllocCache(build(name).config, budget=budget, protect=protect, **settings)
    return float(by_token(name, trace, evicting).mean())


def by_token(name: str, trace: Trace, evicting: Cache) -> torch.Tensor:
    """Tensor[T]: the divergence of every prediction, from two generations' forwards."""
    full = undisturbed(name, trace)
    other = predictions(name, trace, evicting, "reasoncache")
    return (full.exp() * (full - other)).sum(-1)


def one_layer(name: str, eviction: Eviction, rank: int, budget: int) -> ReasonCache:
    """A cache whose layer `rank` alone evicts."""
    policy = replace(eviction.policy(), budget=budget)

    def make_layer(index: int, at: int, layers: int) -> CacheLayer:
        return CacheLayer(index, policy if at == rank else None)

    return ReasonCache(build(name).config, make_layer)


def single_layers(name: str, budgets: tuple[int, ...]) -> torch.Tensor:
    """LongTensor[L * budgets, L, H_kv]: each layer at each budget, the others keep everything."""
    geometry = Geometry.of(build(name).config)
    layers, everything = len(geometry.full_attention_layers), 10**9
    kept = torch.full((layers, len(budgets), layers, geometry.kv_heads), everything)
    for rank, place in product(range(layers), range(len(budgets))):
        kept[rank, place, rank] = budgets[place]
    return kept.flatten(0, 1)


@pytest.mark.parametrize("name", [*BUILDERS, "gemma3, sliding first", "gpt_oss, sliding first"])
def test_layers_squeezed_together_are_measured_as_if_each_were_alone(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if "sliding first" in name:
        name = name.partition(",")[0]
        monkeypatch.setattr(f"{__name__}.build", sliding_first)
        monkeypatch.setattr(f"{__name__}.undisturbed", undisturbed.__wrapped__)
    model, trace, every = build(name), make_trace(), 3
    eviction = Eviction(scorer=RKV(queries=4), buffer=6, window=4)
    # The second joins while the first is evicting already; the third never evicts.
    budgets = (10, 27, trace.length)
    kept = single_layers(name, budgets)
    layers = kept.shape[1]
    # Neither the order of the settings nor how they are batched matters.
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
    settings = (trace, eviction.policy(), kept[order])
    found = output_error(model, *settings)
    expected = torch.stack(
        [
            by_token(name, trace, one_layer(name, eviction, rank, budget))
            for rank, budget in product(range(layers), budgets)
        ]
    )[order]
    torch.testing.assert_close(found, expected.mean(-1), rtol=1e-3, atol=1e-6)
    assert ((found > 1e-4) == (order % len(budgets) < 2)).all()
    few = output_error(model, *settings, rows=2, every=every)
    torch.testing.assert_close(few, expected[:, ::every].mean(-1), rtol=1e-3, atol=1e-6)


def test_divergence_is_exact_where_rows_are_nearly_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    full = 5 * torch.randn(1, 4, 2000, generator=generator)
    noise = torch.randn(3, 4, 2000, generator=generator)
    scale = torch.tensor([1e-3, 1e-2, 1.0])[:, None, None]
    logits = torch.cat([full, full + scale * noise])
    logs = logits.double().log_softmax(-1)
    expected = (logs[0].exp() * (logs[0] - logs[1:])).sum((-1, -2))
    assert expected[0] < 1e-5
    torch.testing.assert_close(divergence(logits), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(divergence(logits.double()), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", [0.0, -60.0, 300.0])
@pytest.mark.parametrize("drop", [1.0, 30.0, 200.0])
def test_divergence_where_weights_vanish(shift: float, drop: float) -> None:
    full = torch.tensor([[[drop, 0.0, -1.0]]])
    logits = torch.cat([full, torch.tensor([[[0.0, 3.0, -drop]]]) + shift])
    logs = logits.double().log_softmax(-1)
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum()
    torch.testing.assert_close(divergence(logits)[0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("obstacle", ["no list of blocks", "rows are counted"])
def test_where_rows_cannot_join_at_their_layer_they_run_through_all(
    monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    model, trace = build("llama"), make_trace()
    settings = (trace, Eviction(RKV(queries=4), 6, 4).policy(), single_layers("llama", (10, 27)))
    expected = output_error(model, *settings)
    assert expected.min() > 1e-4
    widest = []
    model.model.layers[0].register_forward_hook(lambda block, args, out: widest.append(len(out)))
    output_error(model, *settings)
    assert max(widest) == 3, "the full row, and the first layer at two budgets"
    if obstacle == "no list of blocks":
        monkeypatch.setattr(torch.nn, "ModuleList", type(None))
    else:
        embed = model.model.embed_tokens
        fed = []
        embed.register_forward_pre_hook(lambda module, args: fed.append(len(args[0])))

        def count(norm: torch.nn.Module, args: tuple) -> None:
            if len(args[0]) != fed[-1]:
                raise RuntimeError("another number of rows than was fed")

        model.model.norm.register_forward_pre_hook(count)
    torch.testing.assert_close(output_error(model, *settings), expected, rtol=1e-4, atol=1e-7)
    assert max(widest) == 7


@pytest.mark.parametrize(
    ("name", "scorer", "heads"),
    in_turn(["llama", "qwen2_sliding", "gpt_oss"], [RKV(queries=4), H2O()], [False, True]),
    ids=str,
)
def test_chunks_and_rows_measure_what_single_tokens_do(
    name: str, scorer: RKV | H2O, heads: bool
) -> None:
    trace = make_trace()
    eviction = Eviction(scorer=scorer, buffer=6, window=4, head_budgets=heads)
    found = output_error(build(name), trace, eviction.policy(), everywhere(name, BUDGETS))
    expected = [one_by_one(name, trace, eviction, budget) for budget in BUDGETS]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-3, atol=1e-6)
    assert min(expected[:2]) > 1e-3
    # Forwards that several evictions fall into.
    settings = trace, eviction.policy(), everywhere(name, BUDGETS)
    coarse = output_error(build(name), *settings, chunk=16)
    torch.testing.assert_close(coarse, found, rtol=1e-3, atol=1e-6)


def test_a_protected_prompt_is_protected() -> None:
    trace = make_trace()
    eviction = Eviction(scorer=RKV(queries=4), buffer=6, window=4, protect_prompt=True)
    found = output_error(build("llama"), trace, eviction.policy(), everywhere("llama", (27, 44)))
    expected = [one_by_one("llama", trace, eviction, budget) for budget in (27, 44)]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match=r"budgets >= 25 .* got 24"):
        output_error(build("llama"), trace, eviction.policy(), everywhere("llama", (24,)))


def test_a_layer_or_head_that_keeps_everything_adds_no_error() -> None:
    model, trace = build("llama"), make_trace()
    policy = Eviction(scorer=RKV(queries=4), buffer=6, window=4).policy()
    budgets = everywhere("llama", (trace.length, 10**9, 10, 10, 10)).clone()
    budgets[3, 1:] = trace.length
    budgets[4, 1:] = trace.length
    budgets[4, 0, 1] = trace.length
    errors = output_error(model, trace, policy, budgets).tolist()
    assert errors[0] == errors[1] == pytest.approx(0.0, abs=1e-9)
    assert 1e-4 < errors[4] < errors[3] < errors[2]


def test_a_row_does_not_depend_on_the_others() -> None:
    model, trace = build("llama"), make_trace()
    policy = Eviction(scorer=RKV(queries=4), buffer=6, window=4).policy()
    budgets = everywhere("llama", BUDGETS)
    together = output_error(model, trace, policy, budgets)
    torch.testing.assert_close(output_error(model, trace, policy, budgets, rows=2), together)
    alone = torch.cat([output_error(model, trace, policy, row[None]) for row in budgets])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-7)
