"""Stochastic rounding: the distribution of the random numbers, their independence of the layout, and the rounded values."""

import pytest
import torch

from maskllm.ops import NoiseKey, ShardMap, noise, philox_key, rounding_bits, stochastic_bf16

KEY = philox_key(1, "decoder.layers.0.mlp.linear_fc1.rounding")


def bits(shard: ShardMap, rows: int, blocks: int, candidates: int = 6, step: int = 7) -> torch.Tensor:
    return rounding_bits(NoiseKey(KEY, step, shard), blocks, 0, rows * blocks, candidates).view(rows, blocks, candidates)


@pytest.mark.parametrize("candidates", [4, 6, 8, 20])
def test_kernels_draw_the_references_numbers(candidates):
    shard = ShardMap(40, block_offset=7, row_offset=1 << 20, split_row=3, split_offset=1 << 31)
    key = NoiseKey(KEY, 1 << 35, shard)
    found = rounding_bits(key, 9, 4, 41, candidates)
    assert torch.equal(found.long(), noise.rounding_bits(key, 9, 4, 41, candidates))


def test_numbers_are_uniform_and_differ_by_step():
    numbers = bits(ShardMap(512), 64, 512).flatten().double()
    assert numbers.min() >= 0 and numbers.max() < 1 << 16
    ordered = numbers.sort().values / (1 << 16)
    distance = (ordered - torch.linspace(0, 1, len(ordered), dtype=torch.float64)).abs().max()
    assert distance < 1.95 / len(ordered) ** 0.5  # Kolmogorov-Smirnov at the 0.1 % level
    other = bits(ShardMap(512), 64, 512, step=8).flatten().double()
    assert torch.corrcoef(torch.stack([numbers, other]))[0, 1].abs() < 4 / len(numbers) ** 0.5


def test_a_shard_draws_its_part_of_the_whole_tensors_numbers():
    whole = bits(ShardMap(10), 6, 10)
    assert torch.equal(whole[:, 5:], bits(ShardMap(10, block_offset=5), 6, 5))
    assert torch.equal(whole[[1, 4]], bits(ShardMap(10, row_offset=1, split_row=1, split_offset=4), 2, 10))
    assert torch.equal(whole.view(60, 6)[13:29], rounding_bits(NoiseKey(KEY, 7, ShardMap(10)), 10, 13, 16, 6))


def test_rounding_picks_a_neighbour_and_is_unbiased():
    torch.manual_seed(0)
    values = torch.randn(1 << 16) * torch.logspace(-30, 30, 1 << 16)
    numbers = bits(ShardMap(1 << 14), 1, 1 << 14, candidates=4).flatten()
    rounded = stochastic_bf16(values, numbers)
    nearest = values.bfloat16()
    spacing = 2.0 ** (values.double().abs().log2().floor() - 7)
    error = (rounded.double() - values.double()) / spacing
    assert error.abs().max() < 1
    assert (rounded != nearest).float().mean() == pytest.approx(0.25, abs=0.02)
    assert error.mean().abs() < 4 * error.std() / len(values) ** 0.5
    assert torch.equal(stochastic_bf16(nearest.float(), numbers), nearest), "a value that bf16 represents must not change"


def test_a_value_is_rounded_up_in_proportion_to_its_distance():
    low, high = torch.tensor(1.0), torch.tensor(1.0 + 2**-7)
    for share in (0.1, 0.5, 0.9):
        values = torch.full((1 << 16,), float(low + (high - low) * share))
        rounded = stochastic_bf16(values, bits(ShardMap(1 << 14), 1, 1 << 14, candidates=4).flatten()).float()
        assert set(rounded.tolist()) == {float(low), float(high)}
        assert (rounded == high).float().mean() == pytest.approx(share, abs=0.01)


def test_infinities_and_nan_do_not_change():
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    rounded = stochastic_bf16(values, torch.full((4,), 0xFFFF, dtype=torch.int32))
    assert torch.equal(rounded[[0, 1, 3]], values[[0, 1, 3]].bfloat16())
    assert rounded[2].isnan()
