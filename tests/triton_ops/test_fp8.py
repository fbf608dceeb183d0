"""Codes of 8 bits against the nearest numbers of e4m3, and attention to them in bounded memory."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.ops.attention_cases import (
    OPTIONS,
    SHAPES,
    arguments_of,
    assert_close,
    cases,
    expected,
    make_case,
)
from tests.support.ops.code_cases import PARTS, in_codes, latents_in_codes, rows
from tests.support.ops.prefix_cases import SHAPES as PREFIXES
from tests.support.ops.prefix_cases import make_shared
from triton_ops.decode_attention import cpu, decode_attention, even_attention, products
from triton_ops.fp8 import dequantise, quantise
from triton_ops.layout import RaggedLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_code_is_the_nearest_of_all_numbers(dtype):
    x = rows(dtype)
    codes, scales = quantise(x)
    assert codes.dtype == torch.uint8 and scales.dtype == dtype and scales.shape == x.shape[:-1]
    wanted = x.double() / scales.double()[..., None]
    finite = NUMBERS[~NUMBERS.isnan()]
    nearest = (wanted[..., None] - finite).abs().amin(-1)
    # In float32 a quotient is rounded before it becomes a code.
    found = (wanted - NUMBERS[codes.long()]).abs()
    assert bool((found <= nearest + 1e-6 * wanted.abs()).all())
    # The largest number of a row uses the whole range.
    assert bool((NUMBERS[codes.long()].abs().amax(-1)[x.abs().amax(-1) > 0.05] == 448).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_is_read_as_its_number(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[~NUMBERS.isnan()].view(2, 127)
    scales = torch.tensor([0.75, 2.0**-9], dtype=dtype)
    found = dequantise(codes, scales)
    assert found.dtype == dtype
    wanted = (NUMBERS[codes.long()] * scales.double()[:, None]).to(dtype)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_and_of_nan_stay_so(dtype):
    x = torch.zeros(1, 1, 2, 16, dtype=dtype)
    x[0, 0, 1, 3] = torch.nan
    found = dequantise(*quantise(x))
    assert not found[0, 0, 0].any() and bool(found[0, 0, 1].isnan().all())


# ---------------------------------------------------------------------------------------- attention


@pytest.fixture(params=["whole", "small"])
def blocks(request, monkeypatch):
    """Blocks that hold all, or a few tokens of one head, and few logits at once."""
    if request.param == "small":
        monkeypatch.setattr(products, "TOKENS", 4)
        monkeypatch.setattr(products, "BYTES", 4 * 8 * 4)
        monkeypatch.setattr(cpu, "_LOGITS", 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_the_definition(shape, parts, dtype, blocks):
    for group, steps in ((1, 1), (4, 1), (4, 5)):
        case = make_case(*SHAPES[shape], group, steps, dtype=dtype, poison=1.0)
        held, whole, scales = in_codes(case, parts)
        out, _, lse = expected(whole)
        total = torch.empty(lse.shape)
        assert_close(held.run(logsumexp=total, **scales), out, TOLERANCE[dtype])
        torch.testing.assert_close(total.double(), lse, atol=TOLERANCE[dtype], rtol=1e-6)


@settings(max_examples=40)
@given(case=cases(), options=OPTIONS)
def test_any_pool_equals_the_definition(case, options):
    held, whole, scales = in_codes(case, ("keys", "values"))
    arguments = arguments_of(case, options)
    out, received, _ = expected(whole, softcap=options["softcap"], s_aux=arguments["s_aux"])
    assert_close(held.run(**arguments, **scales), out, 2e-5)
    if options["cumulative_attention"]:
        found = arguments["cumulative_attention"].double()
        torch.testing.assert_close(found, received, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_heads_that_hold_equally_many(parts, blocks):
    case = make_case([[9, 9, 9]] * 2, [[7, 7, 7]] * 2, 4, 1)
    held, whole, scales = in_codes(case, parts)
    query = case.query.flatten(1, 2)
    out = even_attention(query, held.keys, held.values, case.layout, 7, 0.3, **scales)
    assert_close(out, expected(whole)[0], 2e-5)


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("shape", PREFIXES)
def test_shared_prefixes_equal_the_definition(shape, parts, blocks):
    case = make_shared(*PREFIXES[shape], 3, 2)
    own, whole, scales = in_codes(case.own, parts)
    prefix, whole_prefix, of_prefix = in_codes(case.prefix, parts)
    held = replace(case, own=own, prefix=replace(prefix, **of_prefix))
    out, _ = replace(case, own=whole, prefix=whole_prefix).expected()
    assert_close(held.run(**scales), out, 2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "steps"), [(4, 1), (5, 3)])
def test_values_that_are_the_first_numbers_of_keys(group, steps, dtype, blocks):
    case = make_case([[70, 9]], [[66, 9]], group, steps, sizes=(40, 40), dtype=dtype, poison=1.0)
    held, whole, scales = latents_in_codes(case, 32)
    out, received, _ = expected(whole)
    found = torch.zeros(held.layout.slots)
    assert_close(held.run(cumulative_attention=found, **scales), out, TOLERANCE[dtype])
    tolerance = 5 * TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), received, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", PREFIXES)
def test_shared_latents_equal_the_definition(shape, blocks):
    case = make_shared(*PREFIXES[shape], 4, 1, sizes=(40, 40))
    own, whole, scales = latents_in_codes(case.own, 32)
    prefix, whole_prefix, of_prefix = latents_in_codes(case.prefix, 32)
    out, _ = replace(case, own=whole, prefix=whole_prefix).expected()
    found = replace(case, own=own, prefix=replace(prefix, **of_prefix)).run(**scales)
    assert_close(found, out, 2e-5)


class Largest(TorchDispatchMode):
    """The most bytes of any tensor of numbers that an operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor) and not func.is_view:
                self.nbytes = max(self.nbytes, each.nbytes)
        return out


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(("heads", "size", "first"), [(4, 64, 64), (1, 288, 256)])
def test_no_copy_of_a_pool_is_made(heads, size, first, even):
    """Neither of keys and values nor of latents."""
    tokens = 6000
    layout = RaggedLayout(torch.full((1, heads), tokens))
    codes = torch.randint(0, 120, (layout.slots, size), dtype=torch.uint8)
    scale = torch.rand(layout.slots)
    query = torch.randn(1, heads, 2, 1, size)
    scales, values = dict(key_scales=scale, value_scales=scale), codes[:, :first]
    with Largest() as made:
        if even:
            query = query.flatten(1, 2)
            even_attention(query, codes, values, layout, tokens, 0.1, **scales)
        else:
            length = torch.tensor([[5000, tokens, tokens, 100][:heads]])
            settings = dict(query_positions=None, scaling=0.1)
            decode_attention(query, codes, values, None, layout, length, **settings, **scales)
    assert made.nbytes <= products.BYTES < codes.nbytes


def test_many_queries_have_few_logits_at_once(monkeypatch):
    monkeypatch.setattr(cpu, "_LOGITS", 1 << 14)
    held, _, scales = in_codes(make_case([[512, 512]], [[512, 512]], 4, 64), ("keys", "values"))
    with Largest() as made:
        held.run(**scales)
    assert made.nbytes <= products.BYTES
