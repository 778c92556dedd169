"""2:4 compression: round trips, the documented layout, and what is refused."""

import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import compress24, decompress24, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def _matrix(dtype, out=5, blocks=7, seed=0):
    """Random 2:4 blocks; some have three or four zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (out, blocks, 4), generator=generator)
    order = torch.rand(out, blocks, 4, generator=generator).argsort(-1)
    kept = torch.randint(0, 3, (out, blocks, 1), generator=generator)
    return torch.where(order < kept, values, 0).flatten(1).to(dtype)


def _bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("blocks", [1, 2, 7, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_exact(dtype, blocks):
    matrix = _matrix(dtype, blocks=blocks)
    values, metadata = compress24(matrix)
    assert (values.shape, values.dtype) == ((5, 2 * blocks), dtype)
    assert (metadata.shape, metadata.dtype) == ((5, -(-blocks // 2)), torch.uint8)
    assert torch.equal(_bits(decompress24(values, metadata)), _bits(matrix))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_and_reference_give_the_same_bytes(dtype):
    matrix = _matrix(dtype, out=64, blocks=33)
    found, expected = compress24(matrix), reference.compress24(matrix)
    assert torch.equal(_bits(found[0]), _bits(expected[0]))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(_bits(reference.decompress24(*found)), _bits(matrix))


def test_layout_is_the_documented_one():
    matrix = torch.tensor([[0.0, 5.0, 0.0, 6.0, 7.0, 8.0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.0]])
    values, metadata = compress24(matrix)
    assert values.tolist() == [[5.0, 6.0, 7.0, 8.0, 0.0, 9.0]]
    assert metadata.tolist() == [[(1 | 3 << 2) | (0 | 1 << 2) << 4, 0 | 2 << 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_negative_zeros_and_nan_keep_their_bits_unless_two_non_zeros_are_beside_them(dtype):
    fits = torch.tensor([[0.0, -0.0, 3.0, 0.0, -0.0, 0.0, 0.0, -0.0, torch.nan, 0.0, 0.0, torch.inf]], dtype=dtype)
    assert torch.equal(_bits(decompress24(*compress24(fits))), _bits(fits))
    crowded = torch.tensor([[1.0, -0.0, 3.0, -0.0]], dtype=dtype)
    assert torch.equal(_bits(decompress24(*compress24(crowded))), _bits(crowded.abs()))


def test_the_smallest_int8_counts_as_a_non_zero():
    matrix = torch.tensor([[-128, 0, -128, 0]], dtype=torch.int8)
    assert torch.equal(decompress24(*compress24(matrix)), matrix)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_with_three_non_zeros_is_refused_with_its_place(dtype):
    matrix = _matrix(dtype, out=40, blocks=600)
    matrix[31, 4:8] = 1
    matrix[11, 2000:2003] = 1
    matrix[11, 2003] = 0
    with pytest.raises(MaskLLMError, match=r"^fc1: row 11, block 500 \(columns 2000 to 2003\) has 3 non-zeros"):
        compress24(matrix, "fc1")


def test_wrong_shapes_and_dtypes_are_refused():
    with pytest.raises(MaskLLMError, match="not a multiple of 4"):
        compress24(torch.zeros(2, 6))
    with pytest.raises(MaskLLMError, match="int64"):
        compress24(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(MaskLLMError, match="decompress24"):
        decompress24(torch.zeros(2, 8), torch.zeros(2, 1, dtype=torch.uint8))
    with pytest.raises(MaskLLMError, match="decompress24"):
        decompress24(torch.zeros(8, 3), torch.zeros(8, 1, dtype=torch.uint8))


def test_operators_pass_opcheck():
    matrix = _matrix(torch.float32)
    torch.library.opcheck(torch.ops.maskllm.compress24.default, (matrix,))
    torch.library.opcheck(torch.ops.maskllm.decompress24.default, compress24(matrix))
