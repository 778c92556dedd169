"""Magnitude masks against a search over all candidates."""

import itertools

import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.patterns import Pattern
from maskllm.pruning.magnitude import magnitude_mask


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "3:5"])
def test_keeps_the_candidate_with_the_largest_sum_of_magnitudes(text):
    pattern = Pattern.parse(text)
    weight = torch.randn(6, 3 * pattern.m, generator=torch.Generator().manual_seed(0))
    mask = magnitude_mask(weight, pattern)
    for row, block in itertools.product(range(6), range(3)):
        columns = slice(block * pattern.m, (block + 1) * pattern.m)
        sums = pattern.candidates() @ weight[row, columns].abs()
        assert mask[row, columns].tolist() == pattern.candidates()[sums.argmax()].bool().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_weights_the_lower_index_is_kept(dtype):
    weight = torch.tensor([[1, -1, 1, 1, 0, 2, -2, 2, 0, 0, 0, 0]], dtype=dtype)
    mask = magnitude_mask(weight, Pattern(2, 4))
    assert mask.int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0]]


def test_wide_patterns_keep_exactly_n():
    weight = torch.randn(8, 128).round(decimals=1)  # many ties
    mask = magnitude_mask(weight, Pattern(16, 32))
    assert (mask.view(8, 4, 32).sum(-1) == 16).all()


def test_unstructured_sparsity_is_counted_over_the_matrix():
    weight = torch.arange(24.0).view(2, 12)
    mask = magnitude_mask(weight, 0.5)
    assert mask.tolist() == [[False] * 12, [True] * 12]


@pytest.mark.parametrize("sparsity", [0.0, 1.0, 50.0])
def test_refuses_a_share_outside_zero_to_one(sparsity):
    with pytest.raises(MaskLLMError, match="between 0 and 1"):
        magnitude_mask(torch.randn(4, 8), sparsity)


def test_refuses_rows_that_do_not_split_into_blocks():
    with pytest.raises(MaskLLMError, match="not a multiple of 4"):
        magnitude_mask(torch.randn(4, 10), Pattern(2, 4))
