"""The noise against published vectors, its distribution, and its independence of the layout."""

import numpy as np
import pytest
import torch

from maskllm.ops import NoiseKey, ShardMap, philox_key
from maskllm.ops.noise import gumbel, philox, uniform_bits

# Known answers for Philox-4x32-10 from its authors' Random123 library: counter, key, words.
VECTORS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_gives_the_published_vectors(counter, key, words):
    out = philox(tuple(torch.tensor([word]) for word in counter), key[0] | key[1] << 32)
    assert [word.item() for word in out] == words


def _one_draw(key: NoiseKey, block: int, candidate: int) -> int:
    """One 21-bit draw, with the bits taken apart in Python integers."""
    counter = [block & 0xFFFFFFFF, block >> 32 & 0xFFFFFF | candidate // 6 << 24, key.sample & 0xFFFFFFFF, key.sample >> 32]
    words = [word.item() for word in philox(tuple(torch.tensor([word]) for word in counter), key.key)]
    bits = (words[0] | words[1] << 32) | (words[2] | words[3] << 32) << 64
    field = candidate % 6
    return bits >> (field // 3 * 64 + field % 3 * 21) & (1 << 21) - 1


def test_draws_use_the_documented_counter():
    key = NoiseKey(0xFEDCBA9876543210, (5 << 32) + 7, ShardMap(1 << 33, block_offset=3, row_offset=2, split_row=1, split_offset=9))
    drawn = uniform_bits(key, 3, 2, 8)
    for row, global_row in enumerate((2, 9, 10)):
        for column in range(2):
            block = (global_row << 33) + 3 + column
            assert drawn[row, column].tolist() == [_one_draw(key, block, candidate) for candidate in range(8)]


def test_shards_draw_what_the_whole_tensor_draws():
    whole = uniform_bits(NoiseKey(1, 2, ShardMap(6)), 8, 6, 6)
    columns = uniform_bits(NoiseKey(1, 2, ShardMap(6, block_offset=2)), 8, 4, 6)
    gated = uniform_bits(NoiseKey(1, 2, ShardMap(6, row_offset=2, split_row=2, split_offset=6)), 4, 6, 6)
    assert torch.equal(columns, whole[:, 2:])
    assert torch.equal(gated, whole[[2, 3, 6, 7]])


def test_layers_samples_and_seeds_draw_differently():
    keys = [philox_key(1, "a"), philox_key(2, "a"), philox_key(1, "b")]
    draws = [uniform_bits(NoiseKey(key, sample, ShardMap(8)), 8, 8, 6) for key in keys for sample in (0, 1)]
    for index, draw in enumerate(draws):
        assert all((draw != other).float().mean() > 0.99 for other in draws[index + 1 :])


def test_gumbel_is_finite_over_every_draw():
    every = (torch.arange(1 << 21, dtype=torch.float32) + 0.5) * 2.0**-21
    assert every.min() > 0
    assert every.max() < 1
    noise = -torch.log(-torch.log(every))
    assert -2.8 < noise.min() < -2.7
    assert 15.2 < noise.max() < 15.3


def test_the_noise_has_the_gumbel_distributions_mean_and_variance():
    noise = gumbel(NoiseKey(philox_key(3, "layer"), 0, ShardMap(256)), 512, 256, 6, torch.float64, "cpu")
    assert abs(noise.mean().item() - np.euler_gamma) < 5 * (np.pi / 6**0.5) / noise.numel() ** 0.5
    assert abs(noise.var().item() / (np.pi**2 / 6) - 1) < 0.02
