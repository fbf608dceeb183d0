"""The kernels that make codes of 8 bits and attend to them, against their definitions."""

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from tests.support.ops.attention_cases import expected, make_case
from tests.support.ops.code_cases import PARTS, in_codes, latents_in_codes, rows
from tests.support.ops.prefix_cases import SHAPES as PREFIXES
from tests.support.ops.prefix_cases import make_shared
from triton_ops.backend import interpreting
from triton_ops.fp8 import quantise
from triton_ops.fp8.kernel import decode, spread
from triton_ops.fp8.reference import dequantise_reference, quantise_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
POOL = ([[70, 9, 5], [65, 64, 1]], [[66, 9, 0], [1, 64, 1]])


def assert_equal(found, wanted, tolerance=1e-5):
    found, wanted = found.double().cpu(), wanted.nan_to_num(0.0)
    assert bool((found - wanted).norm() <= tolerance * max(float(wanted.norm()), 1e-3))


@pytest.mark.parametrize("strides", ["as they come", "heads inside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_scales_are_those_of_the_definition(dtype, strides, device):
    x = rows(dtype).to(device)
    if strides == "heads inside":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    for part in (x, x[:, :, :1]):
        codes, scales = quantise(part)
        wanted, wanted_scales = quantise_reference(part)
        if dtype == torch.bfloat16 and interpreting():
            # The interpreter cuts scales off where they should be rounded, so codes differ too.
            torch.testing.assert_close(scales, wanted_scales, rtol=2**-7, atol=0)
            found = dequantise_reference(codes, scales, torch.float32)
            limit = scales.float()[..., None] * 448 * 2**-4
            assert bool(((found - part.float()).abs() <= limit).all())
        else:
            assert torch.equal(scales, wanted_scales) and torch.equal(codes, wanted)


@triton.jit
def read_kernel(codes, out, TYPE: tl.constexpr, SCALED: tl.constexpr):
    place = tl.arange(0, 256)
    found = tl.load(codes + place)
    if SCALED:
        tl.store(out + place, decode(found, TYPE).to(tl.float32))
    else:
        tl.store(out + place, spread(found, TYPE).to(tl.int16, bitcast=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_is_read_as_its_number(dtype, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    wanted = codes.view(torch.float8_e4m3fn).float()
    if interpreting() and dtype == torch.bfloat16:
        # Which the interpreter neither multiplies nor converts where numbers are so small.
        bits = torch.empty(256, dtype=torch.int16)
        read_kernel[(1,)](codes, bits, tl.bfloat16, SCALED=False)
        out = bits.view(dtype).float() * 2.0**120
    else:
        out = torch.empty(256, device=device)
        read_kernel[(1,)](codes, out, TYPES[dtype], SCALED=True)
    finite = ~wanted.isnan()
    assert torch.equal(out[finite], wanted[finite])


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("group", "steps"), [(1, 1), (5, 3)])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_attention_equals_the_definition(parts, group, steps, extras, device):
    held, whole, scales = in_codes(make_case(*POOL, group, steps, sizes=(40, 24)), parts)
    arguments = {}
    if extras:
        arguments = dict(softcap=1.5, s_aux=torch.linspace(-1, 2, 3 * group))
    out, received, lse = expected(whole, **arguments)
    total = torch.full(lse.shape, math.nan, device=device)
    found = torch.zeros(held.layout.slots, device=device)
    moved = {
        name: x.to(device) if torch.is_tensor(x) else x for name, x in (arguments | scales).items()
    }
    got = held.to(device).run(cumulative_attention=found, logsumexp=total, **moved)
    assert_equal(got, out)
    assert_equal(found, received)
    torch.testing.assert_close(total.double().cpu(), lse, atol=1e-4, rtol=1e-5)


def test_more_queries_than_one_tile(device):
    held, whole, scales = in_codes(make_case([[70, 9]], [[66, 9]], 5, 14), ("keys", "values"))
    moved = {name: x.to(device) for name, x in scales.items()}
    assert_equal(held.to(device).run(**moved), expected(whole)[0])


@pytest.mark.parametrize("size", [128, 576])
def test_head_sizes(size, device):
    case = make_case([[70, 9]], [[66, 9]], 2, 1, sizes=(size, size))
    held, whole, scales = in_codes(case, ("keys", "values"))
    moved = {name: x.to(device) for name, x in scales.items()}
    assert_equal(held.to(device).run(**moved), expected(whole)[0])


@pytest.mark.parametrize(("size", "first"), [(144, 128), (576, 512), (40, 32)])
@pytest.mark.parametrize(("group", "steps"), [(4, 1), (5, 3), (20, 1)])
def test_values_that_are_the_first_numbers_of_keys(size, first, group, steps, device):
    case = make_case([[70, 9]], [[66, 9]], group, steps, sizes=(size, size)).to(device)
    held, whole, scales = latents_in_codes(case, first, device)
    out, received, lse = expected(whole)
    found = torch.zeros(held.layout.slots, device=device)
    total = torch.full(lse.shape, math.nan, device=device)
    assert_equal(held.run(cumulative_attention=found, logsumexp=total, **scales), out)
    assert_equal(found, received)
    torch.testing.assert_close(total.double().cpu(), lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("shape", PREFIXES)
def test_shared_latents_equal_the_definition(shape, device):
    case = make_shared(*PREFIXES[shape], 4, 1, sizes=(144, 144))
    own, whole, scales = latents_in_codes(case.own.to(device), 128, device)
    prefix, whole_prefix, of_prefix = latents_in_codes(case.prefix, 128, device)
    out, _ = replace(case, own=whole, prefix=whole_prefix).expected()
    found = replace(case, own=own, prefix=replace(prefix, **of_prefix)).run(device, **scales)
    assert_equal(found, out)


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("shape", PREFIXES)
def test_shared_prefixes_equal_the_definition(shape, parts, device):
    case = make_shared(*PREFIXES[shape], 3, 2)
    own, whole, scales = in_codes(case.own, parts)
    prefix, whole_prefix, of_prefix = in_codes(case.prefix, parts)
    moved, of_prefix = (
        {name: x.to(device) for name, x in each.items()} for each in (scales, of_prefix)
    )
    held = replace(case, own=own, prefix=replace(prefix, **of_prefix))
    out, _ = replace(case, own=whole, prefix=whole_prefix).expected()
    assert_equal(held.run(device, **moved), out)


def test_a_prefix_in_another_form_is_refused(device):
    case = make_shared(*PREFIXES["one_branch"], 3, 1)
    own, _, scales = in_codes(case.own, ("keys", "values"))
    moved = {name: x.to(device) for name, x in scales.items()}
    with pytest.raises(ValueError, match="expected scales of the same strides for the same fields"):
        replace(case, own=own).run(device, **moved)


def test_a_prefix_with_values_apart_is_refused(device):
    case = make_shared(*PREFIXES["one_branch"], 4, 1, sizes=(40, 40))
    own, _, scales = latents_in_codes(case.own.to(device), 32, device)
    prefix, _, of_prefix = latents_in_codes(case.prefix, 32, device)
    prefix = replace(prefix, values=prefix.values.contiguous(), **of_prefix)
    with pytest.raises(ValueError, match=r"values of the same strides .* got \[32, 40\]"):
        replace(case, own=own, prefix=prefix).run(device, **scales)
