"""`redundancy` against its definition in float64, and the definition against loops."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.ops.redundancy_cases import keys_with, prefix
from triton_ops import cpu_features
from triton_ops.redundancy import GONE, NONE, UNSEEN, cpu, redundancy, search
from triton_ops.redundancy.reference import redundancy_reference


def mean_of(keys, valid, **settings):
    """The redundancy alone, without who repeats whom."""
    return redundancy(keys, valid, **settings)[0]


def defined(keys, valid, threshold=0.5):
    """What each key is worth by the definition in float64."""
    return redundancy_reference(keys.double(), valid, threshold=threshold)[0]


@pytest.mark.parametrize("common", [0.0, 0.6, 0.9, 2.0])
@pytest.mark.parametrize("held", [1, 2, 127, 128, 129, 300])
def test_it_is_its_definition(held, common):
    keys = keys_with(common, (2, 2, held, 8))
    valid = prefix([[held, held // 2], [1, max(1, held - 3)]], held)
    expected = defined(keys, valid)
    torch.testing.assert_close(mean_of(keys, valid), expected, rtol=0, atol=1e-12)
    single = mean_of(keys.float(), valid)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
def test_the_threshold(threshold):
    keys = keys_with(0.6, (1, 2, 150, 8))
    valid = prefix([[150, 140]], 150)
    torch.testing.assert_close(
        mean_of(keys, valid, threshold=threshold),
        defined(keys, valid, threshold),
        rtol=0,
        atol=1e-12,
    )


def test_rows_that_find_no_repeat_are_searched_to_the_end():
    # All but a few keys match at once; those few, others per head, match the oldest key only.
    keys = keys_with(2.0, (1, 2, 400, 16))
    for head, odd in ((0, [3, 77, 399]), (1, [5])):
        keys[0, head, [0, *odd]] = -2.0 + 0.1 * torch.randn(len(odd) + 1, 16, dtype=torch.float64)
    valid = torch.ones(1, 2, 400, dtype=torch.bool)
    torch.testing.assert_close(mean_of(keys, valid), defined(keys, valid), rtol=0, atol=1e-12)


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    kinds=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_repeated_and_zero_keys(counts, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randn(kinds, 4, generator=generator, dtype=torch.float64)
    distinct[0] = 0.0
    pick = torch.randint(kinds, (len(counts), 1, 40), generator=generator)
    keys, valid = distinct[pick], prefix([[count] for count in counts], 40)
    torch.testing.assert_close(mean_of(keys, valid), defined(keys, valid), rtol=0, atol=1e-12)


def test_the_newest_of_the_repeats_is_spared():
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[None, None]
    scores = mean_of(keys, torch.ones(1, 1, 4, dtype=torch.bool))[0, 0]
    # Rows 0 and 1 exempt column 2, row 2 exempts column 1.
    torch.testing.assert_close(scores, torch.tensor([2.0, 1.0, 0.0, 0.0]) / 4)


@pytest.mark.parametrize("common", [0.0, 0.9, 2.0])
@pytest.mark.parametrize("held", [2, 129, 300])
def test_the_repeat_is_the_newest_neighbour_over_the_threshold(common, held):
    keys, valid = keys_with(common, (1, 2, held, 8)), prefix([[held, held - 1]], held)
    assert torch.equal(redundancy(keys, valid)[1], redundancy_reference(keys, valid)[1])


@pytest.mark.parametrize("held", [150, 256, 300, 640])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_keys_with_few_neighbours_find_them_in_any_block(monkeypatch, held, dtype):
    generator = torch.Generator().manual_seed(held)
    keys = torch.randn(1, 4, held, 256, generator=generator, dtype=torch.float64)
    # Every fifth key resembles one other; all the rest are nearly orthogonal.
    for head in keys[0]:
        like = torch.randint(held, (held,), generator=generator)[::5]
        noise = torch.randn(len(like), 256, generator=generator, dtype=torch.float64)
        head[::5] = head[like] + 0.5 * noise
    keys, valid = keys.to(dtype), prefix([[held] * 4], held)
    with by_sign(monkeypatch):
        _, repeat = redundancy(keys, valid)
    assert torch.equal(repeat, redundancy_reference(keys.double(), valid)[1])


@given(
    counts=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    new=st.lists(st.integers(0, 140), min_size=1, max_size=3),
    lost=st.floats(0.0, 0.9),
    common=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 999),
)
def test_a_search_goes_on_from_an_earlier_one(counts, new, lost, common, seed):
    generator = torch.Generator().manual_seed(seed)
    new = (new * 3)[: len(counts)]
    width = max(c + n for c, n in zip(counts, new, strict=True))
    keys = torch.randn(1, len(counts), width, 8, generator=generator, dtype=torch.float64) + common
    before = prefix([counts], width)
    after = prefix([[c + n for c, n in zip(counts, new, strict=True)]], width)
    _, repeat = redundancy(keys, before)
    known = repeat.where(before, UNSEEN)
    # Some keys lose what they knew: their repeat was evicted.
    forgotten = torch.rand(known.shape, generator=generator) < lost
    known = known.masked_fill(forgotten & (known >= 0), GONE)
    expected, searched = redundancy(keys, after), redundancy(keys, after, known=known)
    assert torch.equal(searched[1], expected[1])
    torch.testing.assert_close(searched[0], expected[0], rtol=0, atol=1e-14)


def test_what_is_known_is_not_computed_again():
    keys = keys_with(0.0, (1, 2, 1024, 16))
    old = prefix([[896, 896]], 1024)
    known = redundancy(keys, old)[1].where(old, UNSEEN)
    with Sizes() as sizes:
        redundancy(keys, torch.ones_like(old), known=known)
    sums = 2 * (1024 + 16)
    assert sizes.products == 2 * 1024 * 128 + sums


@pytest.mark.parametrize("common", [0.0, 0.6, 0.8, 1.5])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sign_of_a_product_in_bfloat16_decides_as_float64_does(
    monkeypatch, common, threshold, dtype
):
    keys = keys_with(common, (2, 2, 300, 16), torch.float32)
    # Cosines as close to the threshold as can be: some over it, some not.
    keys[0, 0, ::3] = keys[0, 0, :1]
    keys[0, 0, 1::3] = nearly(keys[0, 0, 0], threshold, len(keys[0, 0, 1::3]))
    # Norms of many sizes, and one without any.
    keys *= torch.randint(-30, 31, (2, 2, 300, 1)).float().exp2()
    keys[1, 0, 7] = 0.0
    keys = keys.to(dtype)
    valid = prefix([[300, 290], [130, 1]], 300)
    with by_sign(monkeypatch) as sizes:
        mean, repeat = redundancy(keys, valid, threshold=threshold)
    # A bar below 0 has no sign.
    assert (torch.bfloat16 in sizes.dtypes) == (dtype == torch.bfloat16 or threshold > 0)
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    others = valid[..., None] & valid[..., None, :] & ~torch.eye(300, dtype=torch.bool)
    cosine = (unit @ unit.mT).where(others, 0.0)
    # What float32 could not tell apart either.
    rounding, place = 2e-6, torch.arange(300)
    exempt = place == repeat[..., None]
    assert (cosine[exempt] > threshold - rounding).all()
    assert not ((cosine > threshold + rounding) & (place > repeat[..., None])).any()
    expected = cosine.masked_fill(exempt, 0.0).sum(-2) / valid.sum(-1, keepdim=True)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_norms_whose_products_leave_the_range_are_compared_in_float32(monkeypatch, scale):
    keys = keys_with(0.6, (1, 2, 200, 16), torch.float32).bfloat16()
    valid = prefix([[200, 150]], 200)
    with by_sign(monkeypatch) as sizes:
        expected = redundancy(keys, valid)
        assert sizes.dtypes == {torch.bfloat16}
    extreme = keys.clone()
    extreme[..., 3, :] *= 2.0 ** round(math.log2(scale))
    with by_sign(monkeypatch) as sizes:
        found = redundancy(extreme, valid)
        assert sizes.dtypes == {torch.float32}
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6)


@contextmanager
def by_sign(monkeypatch):
    """Compare in bfloat16 whatever the CPU can do, and record the products."""
    monkeypatch.setattr(cpu_features, "capabilities", lambda: {"avx512_bf16": True})
    with Sizes() as sizes:
        yield sizes


def nearly(key, cosine, count):
    """Keys whose cosine with `key` is `cosine`, give or take up to 1%, but never by chance."""
    generator = torch.Generator().manual_seed(0)
    unit = key / key.norm()
    other = torch.randn(count, len(key), generator=generator)
    other -= (other @ unit)[:, None] * unit
    wanted = cosine + torch.linspace(-0.01, 0.01, count)[:, None].clamp(max=1 - cosine)
    rest = (1 - wanted**2).clamp(min=0).sqrt()
    return wanted * unit + rest * other / other.norm(dim=-1, keepdim=True)


def test_every_row_is_scored_by_its_own_keys():
    keys = keys_with(0.6, (3, 2, 140, 8))
    valid = prefix([[140, 20], [50, 60], [1, 139]], 140)
    together = mean_of(keys, valid)
    for row in range(3):
        held = int(valid[row].sum(-1).max())
        alone = mean_of(keys[row : row + 1, :, :held], valid[row : row + 1, :, :held])
        torch.testing.assert_close(together[row : row + 1, :, :held], alone, rtol=0, atol=1e-14)
        assert (together[row, :, held:] == 0).all()


def test_a_few_keys_beside_many_are_computed_in_float64_as_they_are_alone():
    keys = keys_with(0.6, (1, 2, 90, 8), torch.float32)
    valid = prefix([[cpu.FEW, 90]], 90)
    exact = defined(keys, valid)[0, 0].float()
    assert torch.equal(mean_of(keys, valid)[0, 0], exact)


def test_filler_may_hold_nan():
    keys = keys_with(0.6, (1, 2, 30, 8))
    valid = prefix([[30, 12]], 30)
    clean = mean_of(keys, valid)
    keys[0, 1, 12:] = torch.nan
    assert torch.equal(mean_of(keys, valid), clean)


class Sizes(TorchDispatchMode):
    """Record the largest tensor that is made, and how many numbers are products."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            if func is torch.ops.aten.bmm.default:
                self.products += result.numel()
                # The sum of unit keys, and its product with every key, are not of this kind.
                if min(result.shape[-2:]) > 1:
                    self.dtypes.add(result.dtype)
        return result


def test_no_buffer_grows_with_the_square_of_the_tokens():
    keys = keys_with(0.0, (1, 1, 1024, 16), torch.float32)
    with Sizes() as sizes:
        mean_of(keys, torch.ones(1, 1, 1024, dtype=torch.bool))
    assert sizes.largest == 1024 * search.BLOCK


def test_many_heads_are_worked_off_in_groups(monkeypatch):
    keys = keys_with(0.6, (3, 3, 160, 8))
    valid = prefix([[160, 1, 30], [2, 160, 60], [159, 58, 57]], 160)
    at_once = mean_of(keys, valid)
    monkeypatch.setattr(cpu, "TILE", 2 * 160**2)
    with Sizes() as sizes:
        in_groups = mean_of(keys, valid)
    assert sizes.largest == 2 * 160 * search.BLOCK
    torch.testing.assert_close(in_groups, at_once, rtol=0, atol=1e-14)


def test_a_sink_does_not_keep_every_row_searching():
    keys = keys_with(2.0, (1, 2, 1024, 16))
    valid = torch.ones(1, 2, 1024, dtype=torch.bool)
    keys[:, :, 0] = -keys[:, :, 0]  # resembles nothing
    with Sizes() as sizes:
        mean_of(keys, valid)
    assert sizes.products < 1.1 * 2 * 1024 * search.BLOCK


@pytest.mark.parametrize(
    ("keys", "valid", "threshold", "words"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), 0.5, r"\[R, H, N, D\]"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4, dtype=torch.bool), 0.5, r"\[1, 2, 4\]"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3), 0.5, "bool"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, dtype=torch.bool), -0.1, "threshold"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, dtype=torch.bool), 1.5, "threshold"),
    ],
)
def test_faults_are_named(keys, valid, threshold, words):
    with pytest.raises(ValueError, match=words):
        mean_of(keys, valid, threshold=threshold)


def test_a_wrong_shape_of_what_is_known_is_named():
    keys, valid = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"known \[1, 2, 3\] like valid, got \[1, 2, 4\]"):
        redundancy(keys, valid, known=torch.full((1, 2, 4), UNSEEN))


def test_the_definition_is_what_loops_say():
    keys, valid = keys_with(0.3, (1, 1, 12, 4)), prefix([[11]], 12)
    mean, repeat = redundancy_reference(keys, valid)
    unit = torch.nn.functional.normalize(keys[0, 0, :11], dim=-1)
    expected = torch.zeros(12, dtype=torch.float64)
    for i in range(11):
        others = [(j, float(unit[i] @ unit[j])) for j in range(11) if j != i]
        exempt = max([j for j, cosine in others if cosine > 0.5], default=NONE)
        assert repeat[0, 0, i] == exempt
        for j, cosine in others:
            expected[j] += 0.0 if j == exempt else cosine / 11
    assert repeat[0, 0, 11] == NONE
    torch.testing.assert_close(mean[0, 0], expected, rtol=0, atol=1e-14)
