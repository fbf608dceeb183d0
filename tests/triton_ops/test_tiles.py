"""Sizes of blocks, worked out on the host before every launch."""

import torch
import triton

from triton_ops.tiles import Tile, block_d, blocks, parts, power_of_two


def test_host_arithmetic_is_that_of_triton():
    for size in [*range(1, 300), 1023, 1024, 1025, 128_000, 2**31 + 1]:
        assert power_of_two(size) == triton.next_power_of_2(size)
        for block in (1, 16, 48, 64):
            assert blocks(size, block) == triton.cdiv(size, block)
    assert blocks(0, 64) == 0
    assert (block_d(1), block_d(80), block_d(256)) == (16, 128, 256)


def test_rows_are_loaded_in_two_tiles_where_one_would_be_too_wide():
    assert [parts(size) for size in (80, 128, 256)] == [(128, 0), (128, 0), (256, 0)]
    assert [parts(size) for size in (144, 192, 576)] == [(128, 16), (128, 64), (512, 64)]
    # The first tile holds the value.
    assert (parts(576, 512), parts(192, 160)) == ((512, 64), (256, 0))
    for size in range(1, 1200):
        first, rest = parts(size)
        assert size <= first + rest <= block_d(size)


def test_a_tile_is_chosen_once():
    assert Tile.of(torch.bfloat16, 4, 128, 128) is Tile.of(torch.bfloat16, 4, 128, 128)
    assert Tile.of(torch.bfloat16, 4, 128, 128) != Tile.of(torch.float32, 4, 128, 128)
