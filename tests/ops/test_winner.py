"""Winners and the N:M check against brute force."""

import itertools

import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import check_mask, reference, winner_bits, winner_mask
from maskllm.patterns import Pattern, pack_mask

PATTERNS = ["2:4", "1:4", "3:4", "2:5", "4:8", "1:32", "14:16"]


def _brute_force(logits, pattern):
    """The winners from Python's max, which takes the first of equal values, and itertools' lexicographic order."""
    kept = list(itertools.combinations(range(pattern.m), pattern.n))
    mask = torch.zeros(logits.shape[0], logits.shape[1] * pattern.m, dtype=torch.bool)
    for row, block in itertools.product(*map(range, logits.shape[:2])):
        values = logits[row, block].tolist()
        for position in kept[max(range(len(values)), key=values.__getitem__)]:
            mask[row, block * pattern.m + position] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_winners_are_the_largest_logits_first_of_equals(pattern, dtype):
    pattern = Pattern.parse(pattern)
    logits = torch.randint(-3, 4, (5, 7, pattern.num_candidates)).to(dtype)
    expected = _brute_force(logits, pattern)
    assert torch.equal(winner_mask(logits, pattern), expected)
    assert torch.equal(winner_bits(logits, pattern), pack_mask(expected))
    assert torch.equal(reference.winner_bits(logits, pattern), pack_mask(expected))
    assert (expected.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all()


def test_nan_and_wrong_shapes_are_refused():
    logits = torch.zeros(3, 4, 6)
    logits[2, 1, 5] = torch.nan
    with pytest.raises(MaskLLMError, match="NaN in row 2, block 1"):
        winner_mask(logits, Pattern(2, 4))
    with pytest.raises(MaskLLMError, match=r"wanted \[out, in / 4, 4\]"):
        winner_bits(torch.zeros(3, 4, 6), Pattern(1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_check_names_the_first_block_with_too_many(dtype):
    matrix = torch.zeros(300, 512, dtype=dtype)
    matrix[:, ::4] = matrix[:, 3::4] = 1
    check_mask(matrix, Pattern(2, 4), "w")
    matrix[299, 1] = matrix[7, 401] = matrix[7, 406] = 1
    with pytest.raises(MaskLLMError, match=r"^w: row 7, block 100 \(columns 400 to 403\) has 3 non-zeros; pattern 2:4 allows 2$"):
        check_mask(matrix, Pattern(2, 4), "w")
    assert reference.first_violation(matrix, Pattern(2, 4)).item() == 7 * 128 + 100
    check_mask(matrix, Pattern(3, 4), "w")


def test_the_check_counts_negative_zeros_as_zeros_and_nan_as_a_value():
    matrix = torch.tensor([[1.0, -0.0, 2.0, -0.0], [torch.nan, 1.0, 2.0, 0.0]])
    check_mask(matrix[:1], Pattern(2, 4), "w")
    with pytest.raises(MaskLLMError, match="row 1, block 0"):
        check_mask(matrix, Pattern(2, 4), "w")
    with pytest.raises(MaskLLMError, match="not a multiple of 8"):
        check_mask(matrix, Pattern(2, 8), "w")


def test_operators_pass_opcheck():
    torch.library.opcheck(torch.ops.maskllm.winner_bits.default, (torch.randn(3, 5, 6), 2, 4))
    torch.library.opcheck(torch.ops.maskllm.first_violation.default, (torch.randn(3, 8), 2, 4))
