"""The layout with the fewest bytes: against the packed size of every layout there is."""

from __future__ import annotations

import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.export.pattern_search import smallest_layout
from maskllm.ops.sparse_linear import Layout, sparse_pack
from maskllm.patterns import MAX_M, Pattern


def sparse(rows: int, columns: int, n: int, m: int, seed: int = 0) -> torch.Tensor:
    """A matrix [rows, columns] with `n` non-zeros in every `m`."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(rows, columns // m, m, generator=generator).argsort(-1)
    return torch.randn(rows, columns, generator=generator).masked_fill((ranks >= n).flatten(1), 0)


def packed_bytes(matrix: torch.Tensor, layout: Layout) -> int:
    return sum(tensor.nbytes for tensor in sparse_pack(matrix, layout).values())


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.float32, 8), (torch.bfloat16, 4)])
@pytest.mark.parametrize(
    ("n", "m", "columns"), [(2, 4, 96), (1, 4, 96), (4, 8, 96), (16, 64, 128), (3, 5, 100), (7, 24, 96), (1, 3, 96), (33, 64, 192)]
)
def test_no_layout_is_smaller(n, m, columns, dtype, bits):
    matrix = sparse(200, columns, n, m).to(dtype)
    found = smallest_layout(matrix != 0, dtype, bits)
    sizes = {"unstructured": packed_bytes(matrix, Layout(None, bits))}
    for block in range(2, MAX_M + 1):
        if columns % block == 0:
            most = int((matrix != 0).unflatten(1, (-1, block)).sum(-1).max())
            if most < block:
                sizes[f"{most}:{block}"] = packed_bytes(matrix, Layout(Pattern(most, block), bits))
    assert packed_bytes(matrix, found) == min(sizes.values())
    assert str(found.pattern) == f"{n}:{m}"


def test_random_zeros_are_unstructured_and_a_dense_matrix_stays_dense():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 256, generator=generator)
    assert smallest_layout(matrix != 0, torch.float32, 32) is None
    some = matrix.masked_fill(torch.rand(64, 256, generator=generator) < 0.5, 0)
    assert smallest_layout(some != 0, torch.float32, 32) == Layout(None, 32)
    few = matrix.masked_fill(torch.rand(64, 256, generator=generator) < 0.05, 0)
    assert smallest_layout(few != 0, torch.bfloat16, 16) is None  # the places take more than the zeros save


def test_one_block_that_breaks_the_pattern_in_a_row_that_is_not_sampled():
    matrix = sparse(1000, 64, 2, 4)
    assert smallest_layout(matrix != 0, torch.float32, 32) == Layout(Pattern(2, 4), 32)
    matrix[777, 12:16] = 1
    assert smallest_layout(matrix != 0, torch.float32, 32).pattern != Pattern(2, 4)
    assert smallest_layout(matrix != 0, torch.float32, 32, Pattern(2, 4)) is None


def test_only_the_wanted_pattern_and_blocks_that_a_group_holds():
    kept = sparse(100, 192, 2, 4) != 0
    assert smallest_layout(kept, torch.float32, 32, Pattern(4, 8)) == Layout(Pattern(4, 8), 32)
    assert smallest_layout(kept, torch.float32, 32, Pattern(1, 4)) is None
    assert smallest_layout(sparse(100, 192, 1, 3) != 0, torch.bfloat16, 8, group_size=64).pattern != Pattern(1, 3)
    with pytest.raises(MaskLLMError, match=r"--group-size 128: wanted a multiple of 24 for the pattern 7:24"):
        smallest_layout(kept, torch.float32, 32, Pattern(7, 24), 128)


def test_a_matrix_of_zeros():
    assert smallest_layout(torch.zeros(8, 64, dtype=torch.bool), torch.float32, 32) is not None


def test_the_bits_decide_and_a_matrix_that_is_not_sparse_stays_dense():
    """Zero rows cost places alone in an unstructured matrix, which outweighs the places of 3:8 for large values only."""
    matrix = sparse(100, 512, 3, 8)
    matrix[:4] = 0
    assert smallest_layout(matrix != 0, torch.float32, 32) == Layout(None, 32)
    assert smallest_layout(matrix != 0, torch.float32, 4, group_size=128) == Layout(Pattern(3, 8), 4, 128)
    few = torch.randn(64, 256).masked_fill(torch.rand(64, 256) < 0.02, 0)
    assert smallest_layout(few != 0, torch.bfloat16, 4) is None  # 4 bits alone would make it smaller


@pytest.mark.parametrize(("bits", "group_size"), [(16, -1), (8, 128), (4, 128)])
def test_more_zeros_than_the_pattern_has_leave_it_its_fast_loops(bits, group_size):
    matrix = sparse(100, 1024, 2, 4)
    few = matrix.masked_fill(torch.rand(matrix.shape) < 0.02, 0)
    assert smallest_layout(few != 0, torch.bfloat16, bits, group_size=group_size).pattern == Pattern(2, 4)
    many = matrix.masked_fill(torch.rand(matrix.shape) < 0.7, 0)
    assert smallest_layout(many != 0, torch.bfloat16, bits, group_size=group_size).pattern != Pattern(2, 4)


def test_scales_that_outweigh_the_zeros():
    assert smallest_layout(sparse(100, 256, 2, 4) != 0, torch.bfloat16, 4, group_size=1) is None
