"""Rows with the same prompt are found, and no others."""

import pytest
import torch

from hf_reasoncache.shards import ALONE, Shard
from hf_reasoncache.storage.new_tokens import NewTokens
from hf_reasoncache.storage.prompt_deduplicator import PromptDeduplicator

SIZE = (6, 2, 5, 8)


def chunk_of(change, dtype=torch.float32):
    """Rows 0 to 2 equal, rows 3 to 5 equal; then `change(keys, values, valid)`."""
    draw = torch.Generator().manual_seed(0)
    like = [0, 0, 0, 1, 1, 1]
    keys, values = (torch.randn(2, *SIZE[1:], generator=draw)[like].to(dtype) for _ in range(2))
    valid = torch.ones(6, 5, dtype=torch.bool)
    change(keys, values, valid)
    return NewTokens(keys, keys, values, valid, {})


def first_like(change, groups=(0,) * 6, dtype=torch.float32):
    return PromptDeduplicator().of(chunk_of(change, dtype), 0, torch.tensor(groups), ALONE).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_up_to_the_order_of_sums(dtype):
    """Products of the first and the last rows of a batch may be added up otherwise."""

    def add_otherwise(keys, values, valid):
        for x in (keys, values):
            x *= 1 + 8 * torch.finfo(dtype).eps * torch.randn(SIZE).clamp(-2, 2)

    assert first_like(add_otherwise, dtype=dtype) == [0, 0, 0, 3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 1], ids=["keys", "values"])
def test_equal_bit_by_bit_in_16_bits(which, dtype):
    def change(*tensors):
        number = tensors[which][1, 1, 4, 3]
        number *= 1 + torch.finfo(dtype).eps

    assert first_like(lambda *_: None, dtype=dtype) == [0, 0, 0, 3, 3, 3]
    assert first_like(change, dtype=dtype) == [0, 1, 0, 3, 3, 3]


@pytest.mark.parametrize(
    ("dtype", "distance"),
    [(torch.float32, 2e-5), (torch.float32, 0.05), (torch.bfloat16, 0.05), (torch.float16, 0.05)],
)
def test_tokens_that_look_alike_are_not_the_same(dtype, distance):
    """As near as the nearest ones of SmolLM2: unused ones in float32, and 'deliverystream' and
    'kinesisfirehose'.
    """

    def change(keys, values, valid):
        for x in (keys, values):
            x[1, :, 4] *= 1 + distance * torch.randn(2, 8)

    assert first_like(change, dtype=dtype) == [0, 1, 0, 3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 1], ids=["keys", "values"])
def test_one_head_of_one_token_makes_a_difference(which, dtype):
    def change(*tensors):
        tensors[which][1, 1, 4] = torch.randn(8).to(dtype)

    assert first_like(change, dtype=dtype) == [0, 1, 0, 3, 3, 3]


def test_padding_counts_and_what_lies_there_does_not():
    def pad(keys, values, valid):
        valid[1:3, 0] = False
        keys[2, :, 0] = 7.0

    assert first_like(pad) == [0, 1, 1, 3, 3, 3]


def test_rows_that_differ_already_stay_apart_and_need_not_be_neighbours():
    assert first_like(lambda *_: None, groups=(0, 1, 0, 3, 1, 3)) == [0, 1, 0, 3, 4, 3]


def test_the_lowest_layer_decides_for_all():
    twins, groups = PromptDeduplicator(), torch.zeros(6, dtype=torch.long)
    equal, other = chunk_of(lambda *_: None), chunk_of(lambda keys, *_: keys[1].neg_())
    assert twins.of(equal, 1, groups, ALONE).tolist() == [0, 0, 0, 3, 3, 3]
    assert twins.of(other, 2, groups, ALONE).tolist() == [0, 0, 0, 3, 3, 3]
    assert twins.of(other, 1, groups, ALONE).tolist() == [0, 1, 0, 3, 3, 3]


def test_rows_are_twins_if_every_process_says_so():
    """Other processes hold other heads; here one of them sees rows 0 and 1 apart, and 2 like 1."""

    class Elsewhere(Shard):
        def gather(self, own):
            return torch.cat([own, torch.tensor([[0], [1], [1], [3], [3], [5]])], 1)

    groups = torch.zeros(6, dtype=torch.long)
    found = PromptDeduplicator().of(chunk_of(lambda *_: None), 0, groups, Elsewhere())
    assert found.tolist() == [0, 1, 1, 3, 3, 5]
