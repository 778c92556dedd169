"""The CUDA kernels against the PyTorch reference. Needs a CUDA GPU and the kernels built for it."""

import pytest
import torch

from maskllm.ops import (
    NoiseKey,
    ShardMap,
    Sparse24Linear,
    compress24,
    decompress24,
    masked_weight,
    philox_key,
    reference,
    winner_bits,
)
from maskllm.ops.extension import has_kernels
from maskllm.ops.sparse24 import AlgorithmCache
from maskllm.patterns import Pattern

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and has_kernels("cuda")), reason="needs a CUDA GPU and its kernels")


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("pattern", "out", "blocks"), [("2:4", 1, 1), ("2:4", 33, 129), ("1:4", 7, 35), ("4:8", 3, 9)])
def test_masked_weight_matches_the_reference(pattern, out, blocks, dtype, hard):
    pattern = Pattern.parse(pattern)
    torch.manual_seed(0)
    weight = torch.randn(out, blocks * pattern.m, device="cuda").to(dtype).requires_grad_()
    logits = torch.randn(out, blocks, pattern.num_candidates, device="cuda", requires_grad=True)
    grad = torch.randn_like(weight)
    key = NoiseKey(philox_key(0, "layer"), 1 << 33, ShardMap(blocks + 5, 2, 1, 3, 40))
    stats = torch.zeros(2, device="cuda")
    masked = masked_weight(
        weight, logits, pattern=pattern, key=key, scale=3.0, temperature=0.7, weight_reg=0.1, hard=hard, stats=stats
    )
    masked.backward(grad)
    double = logits.detach().double()
    expected, sums = reference.forward(weight.detach(), double, pattern, key, 3.0, 0.7, hard, True)
    of_logits, of_weight = reference.backward(grad, weight.detach(), double, pattern, key, 3.0, 0.7, 0.1, hard)
    rounding = max(torch.finfo(dtype).eps, 4e-6)
    for found, wanted, tolerance in (
        (masked, expected, rounding),
        (stats, sums, 4e-6),
        (logits.grad, of_logits, 4e-6),
        (weight.grad, of_weight, rounding),
    ):
        assert (found.double() - wanted.double()).abs().max() <= tolerance * wanted.abs().max()


def test_the_gradient_is_added_to_an_unaligned_main_grad():
    weight = torch.randn(8, 32, device="cuda", dtype=torch.bfloat16)
    logits = torch.nn.Parameter(torch.randn(8, 8, 6, device="cuda"))
    logits.main_grad = torch.ones(8 * 8 * 6 + 1, device="cuda")[1:].view(8, 8, 6)
    key = NoiseKey(1, 2, ShardMap(8))
    masked_weight(weight, logits, pattern=Pattern(2, 4), key=key, scale=1.0, temperature=1.0).sum().backward()
    grad = torch.ones_like(weight)
    expected = 1 + reference.backward(grad, weight, logits.detach(), Pattern(2, 4), key, 1.0, 1.0, 0.0, False)[0]
    torch.testing.assert_close(logits.main_grad, expected, rtol=1e-5, atol=1e-5)


def test_a_cuda_graph_can_capture_the_launches():
    weight, logits = torch.randn(64, 256, device="cuda"), torch.randn(64, 64, 6, device="cuda")
    options = {"pattern": Pattern(2, 4), "key": NoiseKey(1, 2, ShardMap(64)), "scale": 1.0, "temperature": 1.0}
    expected = masked_weight(weight, logits, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = masked_weight(weight, logits, **options)
    graph.replay()
    assert torch.equal(captured, expected)


def test_matrix_operators_match_those_on_the_cpu():
    logits = torch.randint(-3, 4, (9, 13, 6)).float()
    assert torch.equal(winner_bits(logits.cuda(), Pattern(2, 4)).cpu(), winner_bits(logits, Pattern(2, 4)))
    matrix = torch.randn(9, 13, 4) * (torch.rand(9, 13, 4).argsort(-1) < 2)
    matrix = matrix.flatten(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        cpu, cuda = compress24(matrix.to(dtype)), compress24(matrix.to(dtype).cuda())
        assert all(torch.equal(one.view(torch.uint8), other.cpu().view(torch.uint8)) for one, other in zip(cpu, cuda, strict=True))
        assert torch.equal(decompress24(*cuda).cpu(), decompress24(*cpu))


@pytest.mark.parametrize("activation", ["", "relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_linear_matches_dense(dtype, activation, tmp_path):
    torch.manual_seed(0)
    weight = torch.randn(256, 64, 4, device="cuda") * (torch.rand(256, 64, 4, device="cuda").argsort(-1) < 2)
    weight, bias = weight.flatten(1).to(dtype) / 16, torch.randn(256, device="cuda").to(dtype)
    layer = Sparse24Linear(weight, bias, activation, cache=AlgorithmCache(tmp_path / "cache.json"))
    layer.tune(37)
    for tokens in (1, 37, 128):
        data = torch.randn(tokens, 256, device="cuda").to(dtype)
        expected = torch.nn.functional.linear(data.double(), weight.double(), bias.double())
        if activation == "relu":
            expected = torch.relu(expected)
        elif activation == "gelu":
            expected = torch.nn.functional.gelu(expected, approximate="tanh")
        assert (layer(data).double() - expected).abs().max() < 8 * torch.finfo(dtype).eps * expected.abs().max()
