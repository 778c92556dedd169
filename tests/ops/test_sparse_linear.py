"""Products with stored non-zeros: exactness, the documented layout, what is refused, instruction sets and threads."""

import itertools

import numpy as np
import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import Layout, sparse_check, sparse_expand, sparse_linear, sparse_pack
from maskllm.ops import sparse_reference as reference
from maskllm.ops.extension import kernels
from maskllm.ops.sparse_linear import TENSORS
from maskllm.patterns import Pattern

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(4, 8), Pattern(1, 16), Pattern(16, 64), None]
DTYPES = {32: [torch.float32], 16: [torch.bfloat16, torch.float16], 8: [torch.bfloat16], 4: [torch.float32]}
needs_kernels = pytest.mark.skipif(kernels() is None, reason="the kernels were not built")


def matrix(pattern, out, in_features, dtype=torch.float32, seed=0):
    """A random matrix that follows the pattern (half of the weights if None); some blocks have fewer non-zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, in_features, generator=generator)
    score = torch.rand(out, in_features, generator=generator)
    if pattern is None:
        mask = score < 0.5
    else:
        order = score.view(out, -1, pattern.m).argsort(-1).argsort(-1)
        mask = (order < pattern.n).view(out, in_features)
    mask &= torch.rand(out, in_features, generator=generator) > 0.05
    return torch.where(mask, weight, 0).to(dtype)


def columns(pattern, least):
    """The first number of columns from `least` on that the pattern divides."""
    m = pattern.m if pattern else 1
    return -(-least // m) * m


def layouts(bits):
    for pattern in PATTERNS:
        yield Layout(pattern, bits)
        if bits in (8, 4):
            for group_size in (128, 64, 3 * (pattern.m if pattern else 1)):
                yield Layout(pattern, bits, group_size)


ALL_LAYOUTS = [layout for bits in (32, 16, 8, 4) for layout in layouts(bits)]


def name(layout):
    return f"{layout.pattern or 'any'}-{layout.bits}-{layout.group_size}"


def stored(tensors):
    return [tensors.get(key) for key in TENSORS]


@pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=name)
def test_round_trip(layout):
    for dtype, least in itertools.product(DTYPES[layout.bits], (1, 20, 200)):
        in_features = columns(layout.pattern, least)
        weight = matrix(layout.pattern, 5, in_features, dtype)
        tensors = sparse_pack(weight, layout)
        kept = tensors["row_starts"][-1] if layout.pattern is None else None
        assert {key: list(value.shape) for key, value in tensors.items()} == layout.shapes(5, in_features, kept)
        assert {key: value.dtype for key, value in tensors.items()} == layout.dtypes(dtype)
        sparse_check(tensors, layout, 5, in_features, "w")
        expanded = sparse_expand(tensors, layout, in_features, torch.float32)
        if layout.quantized:
            error = (expanded - weight.float()).abs()
            step = reference.each_column(tensors["scales"], in_features, layout.group_size)
            assert bool((error <= 0.5001 * step).all())
            assert not expanded[weight == 0].any()
        else:
            same = sparse_expand(tensors, layout, in_features, dtype)
            assert torch.equal(same.view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_negative_zeros_and_nan_come_back(pattern, bits):
    dtype = DTYPES[bits][0]
    weight = torch.zeros(3, columns(pattern, 40), dtype=dtype)
    weight[0, 3], weight[1, 1], weight[2, 5], weight[2, -1] = -0.0, torch.nan, torch.inf, -0.0
    tensors = sparse_pack(weight, Layout(pattern, bits))
    expanded = sparse_expand(tensors, Layout(pattern, bits), weight.shape[1], dtype)
    assert torch.equal(expanded.view(torch.uint8), weight.view(torch.uint8))


def test_layout_is_the_documented_one():
    weight = torch.tensor([[0, 5, 0, 6, 7, -7, 0, 0, 0, 0, 1, 0]]).float()
    two = sparse_pack(weight, Layout(Pattern(2, 4), 32))
    assert two["values"].tolist() == [[5, 6, 7, -7, 0, 1]]
    assert two["places"].tolist() == [[(1 | 3 << 2) | (0 | 1 << 2) << 4, 0 | 2 << 2]]
    four = sparse_pack(weight, Layout(Pattern(2, 4), 4, 4))
    assert four["scales"].tolist() == [[np.float32(6) / np.float32(7), 1, np.float32(1) / np.float32(7)]]
    assert four["values"].tolist() == [[6 | 7 << 4, 7 | 9 << 4, 0 | 7 << 4]]
    one = sparse_pack(weight * torch.tensor([[1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]]), Layout(Pattern(1, 4), 32))
    assert one["values"].tolist() == [[0, -7, 1]]
    assert one["places"].tolist() == [[0 | 1 << 2 | 2 << 4]]
    mask = sparse_pack(weight, Layout(None, 32))
    assert mask["places"].tolist() == np.packbits(weight.numpy() != 0, axis=1, bitorder="little").tolist()
    assert (mask["values"].tolist(), mask["row_starts"].tolist()) == ([5, 6, 7, -7, 1], [0, 5])


def test_a_mask_keeps_zeros_and_given_scales_are_used():
    weight = torch.tensor([[0.0, 3.0, 0.0, 0.0]])
    kept = sparse_pack(weight, Layout(Pattern(2, 4), 32), mask=torch.tensor([[False, True, False, True]]))
    assert (kept["values"].tolist(), kept["places"].tolist()) == ([[3, 0]], [[1 | 3 << 2]])
    scaled = sparse_pack(weight, Layout(Pattern(2, 4), 8), scales=torch.tensor([[0.5]]))
    assert (scaled["values"].tolist(), scaled["scales"].tolist()) == ([[0, 6]], [[0.5]])
    with pytest.raises(MaskLLMError, match=r"^fc1: row 0, column 1 is not zero, and its mask does not keep it"):
        sparse_pack(weight, Layout(Pattern(2, 4), 32), "fc1", mask=torch.tensor([[True, False, False, True]]))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)], ids=str)
def test_too_many_non_zeros_are_refused_with_their_place(pattern):
    weight = matrix(pattern, 4, 64)
    weight[2, 2 * pattern.m : 3 * pattern.m] = 1
    with pytest.raises(MaskLLMError, match=rf"^fc1: row 2, block 2 .* has {pattern.m} non-zeros; pattern {pattern} allows"):
        sparse_pack(weight, Layout(pattern, 32), "fc1")


def test_layouts_that_make_no_sense_are_refused():
    for pattern, bits, group_size in ((None, 7, -1), (Pattern(2, 4), 16, 128), (Pattern(2, 4), 8, 6), (None, 4, 0)):
        with pytest.raises(MaskLLMError, match="wanted"):
            Layout(pattern, bits, group_size)
    with pytest.raises(MaskLLMError, match="finite"):
        sparse_pack(torch.tensor([[torch.nan, 0, 0, 0]]), Layout(Pattern(2, 4), 8))
    with pytest.raises(MaskLLMError, match="bfloat16"):
        sparse_pack(torch.zeros(1, 4, dtype=torch.bfloat16), Layout(Pattern(2, 4), 32))


def test_the_reference_product_is_the_dense_one():
    layout = Layout(Pattern(2, 4), 32)
    weight, data, bias = matrix(layout.pattern, 6, 20), torch.randn(2, 3, 20), torch.randn(6)
    found = torch.ops.maskllm.sparse_linear(data, *stored(sparse_pack(weight, layout)), bias, *layout.numbers)
    assert torch.allclose(found, torch.nn.functional.linear(data, weight, bias), atol=1e-5)
    assert torch.equal(found, sparse_linear(data, sparse_pack(weight, layout), layout, bias))
