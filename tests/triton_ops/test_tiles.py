"""Sizes of blocks, worked out on the host before every launch."""

import torch
import triton

from triton_ops.tiles import Tile, block_d, blocks, power_of_two


def test_host_arithmetic_is_that_of_triton():
    for size in [*range(1, 300), 1023, 1024, 1025, 128_000, 2**31 + 1]:
        assert power_of_two(size) == triton.next_power_of_2(size)
        for block in (1, 16, 48, 64):
            assert blocks(size, block) == triton.cdiv(size, block)
    assert blocks(0, 64) == 0
    assert (block_d(1), block_d(80), block_d(256)) == (16, 128, 256)


def test_a_tile_is_chosen_once():
    assert Tile.of(torch.bfloat16, 4, 128, 128) is Tile.of(torch.bfloat16, 4, 128, 128)
    assert Tile.of(torch.bfloat16, 4, 128, 128) != Tile.of(torch.float32, 4, 128, 128)
