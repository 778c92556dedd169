"""Products with dense matrices by the loops of the stored ones: exactness, threads, what is refused."""

import pytest
import torch

from maskllm.ops.dense_linear import FEW_ROWS, dense_linear
from tests.ops.test_sparse_linear import assert_near, needs_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_match_fp64(instruction_set, dtype):
    """Odd sizes, tails, one row and many, with and without bias."""
    generator = torch.Generator().manual_seed(0)
    for out, in_features in ((1, 1), (3, 20), (5, 64), (9, 263), (6, 1032)):
        weight = torch.randn(out, in_features, generator=generator).to(dtype)
        for rows in (1, 2, 7, FEW_ROWS):
            data = torch.randn(rows, in_features, generator=generator).to(dtype)
            bias = torch.randn(out, generator=generator).to(dtype) if rows % 2 else None
            found = dense_linear(data, weight, bias)
            assert (found.dtype, found.shape) == (dtype, (rows, out))
            assert_near(found, data, weight.double(), torch.zeros(out) if bias is None else bias, False)


@needs_kernels
def test_shapes_and_threads():
    weight, data = torch.randn(333, 520).bfloat16(), torch.randn(2, 3, 1040).bfloat16()[..., ::2]
    wanted = dense_linear(data.contiguous().view(6, 520), weight).view(2, 3, 333)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(dense_linear(data, weight), wanted)
    finally:
        torch.set_num_threads(threads)
    assert dense_linear(data[:0], weight).shape == (0, 3, 333) and dense_linear(data[0, 0], weight).shape == (333,)
    assert dense_linear(data.to("meta"), weight.to("meta")).shape == (2, 3, 333)


@needs_kernels
def test_refused():
    data = torch.zeros(1, 64)
    for weight, bias in (
        (torch.zeros(5, 63), None),
        (torch.zeros(64), None),
        (torch.zeros(5, 64).bfloat16(), None),
        (torch.zeros(64, 5).t(), None),
        (torch.zeros(5, 64), torch.zeros(4)),
    ):
        with pytest.raises(RuntimeError, match="wanted"):
            dense_linear(data, weight, bias)
