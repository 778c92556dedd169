"""The logits that learning starts from."""

from __future__ import annotations

import pytest
import torch

from maskllm.masking.prior import INITIAL_SIGMA, add_prior, initial_logits
from maskllm.ops import ShardMap
from maskllm.patterns import Pattern

PATTERN = Pattern(2, 4)


def draw(shape: tuple[int, int], shard: ShardMap, seed: int = 1, name: str = "decoder.layers.0.mlp.linear_fc1") -> torch.Tensor:
    return initial_logits(shape, PATTERN, seed=seed, layer_name=name, shard=shard, device=torch.device("cpu"))


def test_initial_logits_are_normal():
    logits = draw((64, 256), ShardMap(256)).flatten().double()
    assert logits.mean().item() == pytest.approx(0, abs=4 * INITIAL_SIGMA / len(logits) ** 0.5)
    assert logits.std().item() == pytest.approx(INITIAL_SIGMA, rel=0.01)
    # Kolmogorov-Smirnov distance from the normal distribution, at the 0.1 % level.
    ordered = torch.special.ndtr(logits.sort().values / INITIAL_SIGMA)
    distance = (ordered - torch.linspace(0, 1, len(ordered), dtype=torch.float64)).abs().max()
    assert distance < 1.95 / len(ordered) ** 0.5


def test_initial_logits_depend_on_seed_layer_and_place_in_the_unsharded_tensor():
    whole = draw((6, 10), ShardMap(10))
    assert torch.equal(whole, draw((6, 10), ShardMap(10)))
    assert not torch.equal(whole, draw((6, 10), ShardMap(10), seed=2))
    assert not torch.equal(whole, draw((6, 10), ShardMap(10), name="decoder.layers.1.mlp.linear_fc1"))
    assert torch.equal(whole[:, 5:], draw((6, 5), ShardMap(10, block_offset=5)))
    assert torch.equal(whole[3:], draw((3, 10), ShardMap(10, row_offset=3)))
    gate_and_up = draw((2, 10), ShardMap(10, row_offset=1, split_row=1, split_offset=4))
    assert torch.equal(whole[[1, 4]], gate_and_up)


def test_the_prior_moves_each_candidate_by_its_overlap():
    logits = torch.zeros(1, 2, 6)
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1]]).bool()
    add_prior(logits, mask, PATTERN, strength=3.0)
    step = 3.0 * INITIAL_SIGMA
    # 1100 shares two places with itself, one with 1010, 1001, 0110, 0101 and none with 0011; the mean is one.
    assert torch.allclose(logits[0, 0], torch.tensor([step, 0, 0, 0, 0, -step]))
    assert torch.allclose(logits[0, 1], torch.tensor([0, -step, 0, 0, step, 0]))
