"""Patterns against brute force, and mask bits against NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.patterns import Pattern, pack_mask, unpack_mask


def test_the_six_candidates_of_2_of_4():
    rows = ["".join(str(int(x)) for x in row) for row in Pattern(2, 4).candidates()]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (5, 9)])
def test_candidates_are_all_binary_rows_with_n_ones(n, m):
    pattern = Pattern(n, m)
    brute_force = [row for row in itertools.product((0, 1), repeat=m) if sum(row) == n]
    candidates = [tuple(int(x) for x in row) for row in pattern.candidates()]
    # Lexicographic order of the kept positions is descending order of the rows themselves.
    assert candidates == sorted(brute_force, reverse=True)
    assert pattern.num_candidates == len(brute_force)
    assert pattern.sparsity == pytest.approx(1 - n / m)


@pytest.mark.parametrize(
    "text", ["", "2", "2:", "4:2", "4:4", "0:4", "2:65", "2/4", "-1:4", "2:4:8", "None", "02:4", " 2:4", "2:4\r", "٢:٤", "²:4"]
)
def test_text_that_is_not_a_pattern_is_refused(text):
    with pytest.raises(MaskLLMError, match="wanted N:M"):
        Pattern.parse(text)


def test_a_pattern_with_too_many_candidates_cannot_be_learned():
    Pattern.parse("4:8").require_learnable()
    with pytest.raises(MaskLLMError, match="12870 candidate masks"):
        Pattern.parse("8:16").require_learnable()


def test_a_width_that_is_not_a_multiple_of_m_is_refused():
    with pytest.raises(MaskLLMError, match=r"layer\.weight.*18.*multiple of 4"):
        Pattern(2, 4).check_divides(18, "layer.weight")


@pytest.mark.parametrize("width", [4, 8, 12, 33])
def test_mask_bits_are_those_of_numpy_and_round_trip(width):
    mask = torch.rand(5, width, generator=torch.Generator().manual_seed(width)) > 0.5
    bits = pack_mask(mask)
    assert np.array_equal(bits.numpy(), np.packbits(mask.numpy(), axis=1))
    assert torch.equal(unpack_mask(bits, width), mask)
