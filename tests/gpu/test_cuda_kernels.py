"""The operators on a GPU: gradients, CUDA graphs, cuSPARSELt. Needs a CUDA GPU and the kernels built for it.

test_kernels.py compares the kernels themselves with the CPU's.
"""

import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import NoiseKey, ShardMap, Sparse24Linear, masked_weight, reference
from maskllm.ops.algorithm_cache import AlgorithmCache
from maskllm.ops.extension import has_kernels, kernels
from maskllm.patterns import Pattern

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and has_kernels("cuda")), reason="needs a CUDA GPU and its kernels")


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


def sparse_weight(out: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    blocks = torch.randn(out, inputs // 4, 4, device="cuda")
    return (blocks * (torch.rand_like(blocks).argsort(-1) < 2)).flatten(1).to(dtype)


@pytest.mark.parametrize("activation", ["", "relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_linear_matches_dense(dtype, activation, tmp_path):
    torch.manual_seed(0)
    weight, bias = sparse_weight(256, 256, dtype) / 16, torch.randn(256, device="cuda").to(dtype)
    layer = Sparse24Linear(weight, bias, activation, cache=AlgorithmCache(tmp_path / "cache.json"))
    layer.tune(37)
    for tokens in (1, 37, 128, 37, 0):
        data = torch.randn(tokens + 1, 256, device="cuda").to(dtype)[1:]
        expected = torch.nn.functional.linear(data.double(), weight.double(), bias.double())
        if activation == "relu":
            expected = torch.relu(expected)
        elif activation == "gelu":
            expected = torch.nn.functional.gelu(expected, approximate="tanh")
        largest = max(1.0, expected.abs().max().item()) if tokens else 1.0
        torch.testing.assert_close(layer(data).double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * largest)


def test_layers_of_one_shape_keep_their_own_weights_and_biases(tmp_path):
    """The plan of a product is kept and serves every layer of that shape."""
    torch.manual_seed(0)
    cache, data = AlgorithmCache(tmp_path / "cache.json"), torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    parts = [(sparse_weight(32, 64, data.dtype), torch.randn(32, device="cuda", dtype=data.dtype)) for _ in range(3)]
    layers = [Sparse24Linear(weight, bias, cache=cache) for weight, bias in parts]
    for _ in range(2):
        for layer, (weight, bias) in zip(layers, parts, strict=True):
            torch.testing.assert_close(layer(data), torch.nn.functional.linear(data, weight, bias), rtol=2e-2, atol=5e-2)


def test_the_sparse_layer_reads_inputs_of_any_strides_and_start(tmp_path):
    torch.manual_seed(0)
    weight = sparse_weight(32, 64, torch.float16)
    layer = Sparse24Linear(weight, cache=AlgorithmCache(tmp_path / "cache.json"))
    flat = torch.randn(64 * 16 + 1, device="cuda", dtype=torch.float16)
    for data in (flat[1:].view(16, 64), flat[:-1].view(64, 16).T, flat[:-1].view(2, 8, 64)):
        torch.testing.assert_close(layer(data), torch.nn.functional.linear(data, weight), rtol=2e-3, atol=1e-2)


def test_a_bad_tuned_algorithm_gives_way_to_the_default(tmp_path):
    weight, data = sparse_weight(32, 64, torch.float16), torch.randn(8, 64, device="cuda", dtype=torch.float16)
    layer = Sparse24Linear(weight, cache=AlgorithmCache(tmp_path / "cache.json"))
    if not layer.uses_cusparselt:
        pytest.skip("needs cuSPARSELt")
    expected = layer(data)
    layer.cache.put(layer._key(8), [1 << 20, 1, 0, 0])
    with pytest.warns(RuntimeWarning, match="does not work"):
        assert torch.equal(layer(data), expected)
    assert AlgorithmCache(tmp_path / "cache.json").get(layer._key(8)) is None


def test_the_operators_of_cusparselt_check_their_arguments():
    if not kernels().has_cusparselt:
        pytest.skip("needs cuSPARSELt")
    compress, linear = torch.ops.maskllm.cusparselt_compress, torch.ops.maskllm.cusparselt_linear
    weight, data = sparse_weight(32, 64, torch.float16), torch.randn(8, 64, device="cuda", dtype=torch.float16)
    compressed, bias = compress(weight), torch.zeros(33, device="cuda", dtype=torch.float16)
    moved = torch.zeros(compressed.numel() + 1, device="cuda", dtype=torch.uint8)[1:]
    for arguments, message in (
        ((data.float(), compressed, 32, None, "", []), "Float; wanted Half or BFloat16"),
        ((data, compressed[:-16], 32, None, "", []), "the compressed weight has"),
        ((data, moved, 32, None, "", []), "starts at a multiple of 16"),
        ((data, compressed.cpu(), 32, None, "", []), "on cpu; wanted"),
        ((data, compressed, 32, bias[1:], "", []), "bias must be"),
        ((data, compressed, 32, bias[:32].float(), "", []), "bias must be"),
        ((data[:0], compressed, 32, None, "", []), "tokens > 0"),
        ((data, compressed, 32, None, "silu", []), "wanted relu or gelu"),
        ((data, compressed, 32, None, "", [1, 2]), "an algorithm is 4 numbers"),
        ((data, compressed, 32, None, "", [1 << 40, 1, 0, 0]), "does not fit into 32 bits"),
    ):
        with pytest.raises(RuntimeError, match=message):
            linear(*arguments)
    for dtype in (torch.float32, torch.int8):
        with pytest.raises(RuntimeError, match="wanted Half or BFloat16"):
            compress(weight.to(dtype))


def test_a_state_dict_and_moves_rebuild_the_compressed_weight(tmp_path):
    torch.manual_seed(0)
    cache, data = AlgorithmCache(tmp_path / "cache.json"), torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    layer = Sparse24Linear(sparse_weight(32, 64, data.dtype), cache=cache)
    expected = layer(data)
    other = Sparse24Linear(torch.zeros(32, 64, device="cuda", dtype=data.dtype), cache=cache)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(data), expected)
    with pytest.raises(MaskLLMError, match="on cpu"):
        layer.cpu()(data)
    assert torch.equal(layer.cuda()(data), expected)
