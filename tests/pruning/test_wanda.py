"""Wanda masks and the input statistics against the paper's formulas."""

import pytest
import torch

from maskllm.masking.selection import keep_of_each_row
from maskllm.patterns import Pattern
from maskllm.pruning.statistics import InputStatistics
from maskllm.pruning.wanda import wanda_mask


def score(weight, inputs, row, column):
    """Equation 1 of the paper: S_ij = |W_ij| * ||X_j||_2."""
    return abs(weight[row, column].item()) * sum(x.item() ** 2 for x in inputs[:, column]) ** 0.5


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "5:6"])
def test_the_mask_follows_the_formula_within_each_block(text):
    pattern = Pattern.parse(text)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 4 * pattern.m, generator=generator)
    inputs = torch.randn(30, 4 * pattern.m, generator=generator) * torch.rand(4 * pattern.m, generator=generator) * 5
    mask = wanda_mask(weight, inputs.square().sum(0), pattern)
    for row in range(5):
        for start in range(0, 4 * pattern.m, pattern.m):
            block = range(start, start + pattern.m)
            kept = sorted(block, key=lambda column: -score(weight, inputs, row, column))[: pattern.n]
            assert {column for column in block if mask[row, column]} == set(kept)


def test_an_unstructured_mask_follows_the_formula_within_each_row():
    generator = torch.Generator().manual_seed(2)
    weight, inputs = torch.randn(5, 20, generator=generator), torch.randn(30, 20, generator=generator)
    mask = wanda_mask(weight, inputs.square().sum(0), 0.7)
    for row in range(5):
        kept = sorted(range(20), key=lambda column: -score(weight, inputs, row, column))[:6]
        assert {column for column in range(20) if mask[row, column]} == set(kept)


def test_weights_of_dead_inputs_are_removed_first():
    squares = torch.ones(8)
    squares[[1, 6]] = 0
    weight = torch.ones(3, 8)
    weight[:, [1, 6]] = 100
    mask = wanda_mask(weight, squares, Pattern(2, 4))
    assert mask.int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0]] * 3


def test_a_row_loses_the_floor_of_its_share():
    assert keep_of_each_row(torch.arange(5.0).expand(2, 5), 0.5).int().tolist() == [[0, 0, 1, 1, 1]] * 2


@pytest.mark.parametrize("width", [12, 1100])
def test_the_statistics_are_the_inputs_second_moments(width):
    inputs = [torch.randn(7, 2, width), torch.randn(9, 1, width)]
    statistics = InputStatistics(width)
    for sample in inputs:
        statistics.add(sample)
    tokens = torch.cat([sample.flatten(0, 1) for sample in inputs]).double()
    torch.testing.assert_close(statistics.hessian(), (tokens.T @ tokens).float(), rtol=1e-5, atol=1e-5)  # 2 / 2 samples
    assert (statistics.samples, statistics.tokens, statistics.skipped_tokens) == (2, 23, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_tokens_that_are_not_finite_are_skipped(bad):
    inputs = torch.randn(10, 6)
    expected = InputStatistics(6)
    expected.add(inputs[[0, 1, 2, 4, 5, 6, 7, 8]])
    inputs[3, 2] = bad
    inputs[9, 0] = bad
    statistics = InputStatistics(6)
    statistics.add(inputs)
    torch.testing.assert_close(statistics.hessian(), expected.hessian())
    assert (statistics.tokens, statistics.skipped_tokens) == (8, 2)


def test_the_order_of_samples_does_not_matter():
    samples = [torch.randn(40, 64, generator=torch.Generator().manual_seed(i)) for i in range(32)]
    forward, halves = InputStatistics(64), [InputStatistics(64), InputStatistics(64)]
    for index, sample in enumerate(samples):
        forward.add(sample)
        halves[index % 2].add(sample)
    halves[0].gram += halves[1].gram
    halves[0].samples = 32
    assert torch.equal(forward.hessian(), halves[0].hessian())
