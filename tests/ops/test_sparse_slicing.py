"""Slices and stacks of stored matrices against those of the dense matrix: every layout, cuts inside of blocks, groups and bytes."""

import pytest
import torch

from maskllm.ops import Layout, sparse_check, sparse_expand, sparse_linear, sparse_pack
from maskllm.ops.sparse_slicing import sparse_columns, sparse_rows, sparse_stack
from maskllm.patterns import Pattern
from tests.ops.test_sparse_linear import DTYPES, matrix

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(1, 16), Pattern(16, 64), None]
LAYOUTS = [Layout(pattern, bits) for pattern in PATTERNS for bits in (32, 16, 8, 4)]
LAYOUTS += [Layout(pattern, bits, 64) for pattern in PATTERNS for bits in (8, 4)]
OUT, IN = 10, 384


def name(layout):
    return f"{layout.pattern or 'any'}-{layout.bits}-{layout.group_size}"


def packed(layout, seed=0, out=OUT):
    """A stored matrix, and the dense one that it stands for."""
    tensors = sparse_pack(matrix(layout.pattern, out, IN, DTYPES[layout.bits][0], seed), layout)
    return tensors, sparse_expand(tensors, layout, IN, torch.float32)


def expanded(tensors, layout, in_features):
    """The dense matrix after a check, which every slice has to pass."""
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    sparse_check(tensors, layout, len(tensors["places"]), in_features, "slice")
    return sparse_expand(tensors, layout, in_features, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_rows(layout):
    tensors, dense = packed(layout)
    for first, last in [(0, OUT), (0, 5), (5, 10), (3, 4)]:
        assert torch.equal(expanded(sparse_rows(tensors, layout, first, last), layout, IN), dense[first:last])


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_columns(layout):
    tensors, dense = packed(layout)
    # halves; thirds; twelfths, which cut blocks of 64 and groups; whole blocks of 4 that end inside a byte of places; single columns
    cuts = [
        (0, 192),
        (192, 384),
        (128, 256),
        (256, 384),
        (32, 64),
        (352, 384),
        (4, 12),
        (12, 20),
        (0, 4),
        (5, 6),
        (0, 1),
        (381, 384),
    ]
    for first, last in cuts:
        part, new = sparse_columns(tensors, layout, IN, first, last)
        assert torch.equal(expanded(part, new, last - first), dense[:, first:last])
        m = layout.pattern.m if layout.pattern else 1
        assert new.pattern == (None if first % m or last % m else layout.pattern)
        assert new.bits == layout.bits


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_stack(layout):
    pairs = [packed(layout, seed, out) for seed, out in [(1, 3), (2, 1), (3, 4)]]
    stacked = sparse_stack([tensors for tensors, _ in pairs], layout)
    assert torch.equal(expanded(stacked, layout, IN), torch.cat([dense for _, dense in pairs]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_the_parts_of_tensor_parallelism(layout):
    """Outputs beside each other, and sums of partial products, as column- and row-parallel linears of two ranks make them."""
    tensors, dense = packed(layout)
    data = torch.randn(100, IN, generator=torch.Generator().manual_seed(5))  # so many rows that activations are not rounded
    wanted = torch.nn.functional.linear(data, dense)
    outputs = [sparse_linear(data, sparse_rows(tensors, layout, *rows), layout) for rows in [(0, 5), (5, 10)]]
    torch.testing.assert_close(torch.cat(outputs, 1), wanted, rtol=1e-4, atol=1e-4)
    sums = []
    for first, last in [(0, 192), (192, 384)]:
        part, new = sparse_columns(tensors, layout, IN, first, last)
        sums.append(sparse_linear(data[:, first:last].contiguous(), part, new))
    torch.testing.assert_close(sum(sums), wanted, rtol=1e-4, atol=1e-4)
