"""The parts of the 2:4 layer that need no GPU: what is refused, and the layer on another device's operators."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import Sparse24Linear, compress24, decompress24, sparse24
from maskllm.ops.algorithm_cache import AlgorithmCache


def test_a_weight_on_the_cpu_is_refused():
    with pytest.raises(MaskLLMError, match="fc1: on cpu; 2:4 products need an NVIDIA GPU"):
        Sparse24Linear(torch.zeros(16, 16), name="fc1")


def _weight(out=32, inputs=48, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(out, inputs // 4, 4, generator=generator).argsort(-1) < 2
    return (torch.randn(out, inputs // 4, 4, generator=generator) * kept).flatten(1).to(dtype)


class _Library:
    """Stands in for cuSPARSELt on the CPU: operators with the same arguments, and a list of their calls.

    Its compressed weight is `compress24`'s bytes. It refuses algorithms whose first number is 99.
    """

    def __init__(self):
        self.calls = []

    def compress(self, weight):
        self.calls.append(("compress", weight.clone()))
        values, metadata = compress24(weight)
        return torch.cat([values.flatten().view(torch.uint8), metadata.flatten()])

    def linear(self, input, compressed, out, bias, activation, algorithm):
        self.calls.append(("linear", list(algorithm)))
        if algorithm and algorithm[0] == 99:
            raise RuntimeError("cuSPARSELt: cusparseLtMatmulAlgSetAttribute(...) failed: invalid value\nsecond line")
        if algorithm and algorithm[0] == 98:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        split = out * input.shape[1] // 2 * input.element_size()
        values = compressed[:split].view(input.dtype).view(out, -1)
        weight = decompress24(values, compressed[split:].view(out, -1))
        result = torch.nn.functional.linear(input, weight, bias)
        return torch.relu(result) if activation == "relu" else result

    def search(self, input, compressed, out, bias, activation):
        self.calls.append(("search", input.clone()))
        return [7, 1, 0, 0]


@pytest.fixture
def library(monkeypatch):
    """The layer takes the CPU for a GPU with cuSPARSELt."""
    fake = _Library()
    monkeypatch.setattr(sparse24, "can_multiply", lambda device: device.type == "cpu")
    monkeypatch.setattr(sparse24, "kernels", lambda: SimpleNamespace(has_cusparselt=True))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    with torch.library._scoped_library("maskllm", "IMPL") as implementations:
        for name in ("compress", "linear", "search"):
            implementations.impl(f"cusparselt_{name}", getattr(fake, name), "CPU")
        yield fake


@pytest.fixture
def fallback(monkeypatch):
    """The layer takes the CPU for a GPU, and there is no cuSPARSELt: torch's tensors stand in, here dense ones."""
    monkeypatch.setattr(sparse24, "can_multiply", lambda device: device.type == "cpu")
    monkeypatch.setattr(sparse24, "kernels", lambda: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone())


def _cache(folder) -> AlgorithmCache:
    return AlgorithmCache(folder / "cusparselt.json")


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (_weight(dtype=torch.float32), None, r"fc1: torch\.float32; wanted bfloat16 or float16 \(of fp32 values .* 1 of every 2"),
        (_weight().to(torch.int8), None, r"fc1: torch\.int8; wanted bfloat16 or float16 \(an int8 product needs scales"),
        (_weight(24, 48), None, r"fc1: \[24, 48\]; wanted \[out, in\], both multiples of 16"),
        (_weight(0, 48), None, r"fc1: \[0, 48\]; wanted"),
        (torch.ones(32, 48, dtype=torch.bfloat16), None, "fc1: row 0, block 0 .* has 4 non-zeros"),
        (_weight(), torch.zeros(32), r"fc1: bias torch\.float32 \[32\] on cpu; wanted torch\.bfloat16 \[32\] on cpu"),
        (_weight(), torch.zeros(31, dtype=torch.bfloat16), r"fc1: bias torch\.bfloat16 \[31\] on cpu"),
        (_weight(), torch.zeros(32, dtype=torch.bfloat16, device="meta"), "fc1: bias .* on meta; wanted .* on cpu"),
    ],
)
def test_weights_and_biases_that_do_not_fit_are_refused(library, tmp_path, weight, bias, message):
    with pytest.raises(MaskLLMError, match=message):
        Sparse24Linear(weight, bias, name="fc1", cache=_cache(tmp_path))
    assert library.calls == []


@pytest.mark.parametrize(
    ("input", "message"),
    [
        (torch.zeros(3, 48), r"input torch\.float32 \[3, 48\] on cpu; wanted torch\.bfloat16 \[\.\.\., 48\] on cpu"),
        (torch.zeros(3, 48, dtype=torch.float16), r"input torch\.float16"),
        (torch.zeros(48, 3, dtype=torch.bfloat16), r"input torch\.bfloat16 \[48, 3\]"),
        (torch.zeros((), dtype=torch.bfloat16), r"input torch\.bfloat16 \[\]"),
        (torch.zeros(3, 48, dtype=torch.bfloat16, device="meta"), "on meta; wanted"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(library, tmp_path, input, message):
    layer = Sparse24Linear(_weight(), name="fc1", cache=_cache(tmp_path))
    with pytest.raises(MaskLLMError, match=f"fc1: .*{message}"):
        layer(input)
    assert [call for call, _ in library.calls] == ["compress"]


@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 3, 48), (0, 48), (2, 0, 48)])
@pytest.mark.parametrize("backend", ["library", "fallback"])
def test_inputs_of_any_rank_and_no_tokens_at_all(request, tmp_path, backend, shape):
    request.getfixturevalue(backend)
    weight, bias = _weight(), torch.randn(32).bfloat16()
    layer = Sparse24Linear(weight, bias, "relu", cache=_cache(tmp_path))
    data = torch.randn(shape).bfloat16()
    expected = torch.relu(torch.nn.functional.linear(data, weight, bias))
    found = layer(data)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found, expected)


def test_no_tokens_make_no_product(library, tmp_path):
    assert Sparse24Linear(_weight(), cache=_cache(tmp_path))(torch.zeros(0, 48).bfloat16()).shape == (0, 32)
    assert [call for call, _ in library.calls] == ["compress"]


def test_the_search_multiplies_numbers_that_are_not_zero(library, tmp_path):
    layer = Sparse24Linear(_weight(), cache=_cache(tmp_path))
    state = torch.get_rng_state()
    layer.tune(5)
    layer.tune(7)  # of the same bucket: found in the cache
    assert torch.equal(torch.get_rng_state(), state)
    _, (name, example) = library.calls
    assert name == "search" and example.shape == (8, 48) and (example != 0).float().mean() > 0.9
    layer(torch.ones(3, 48).bfloat16())
    assert library.calls[-1] == ("linear", [7, 1, 0, 0])


def test_an_algorithm_that_the_library_refuses_gives_way_to_the_default(library, tmp_path):
    weight, data = _weight(), torch.randn(3, 48).bfloat16()
    layer = Sparse24Linear(weight, cache=_cache(tmp_path))
    layer.cache.put(layer._key(3), [99, 1, 0, 0])
    with pytest.warns(
        RuntimeWarning, match=r"cusparselt\.json: the algorithm \[99, 1, 0, 0\] of '32x48x8 .* does not work"
    ) as caught:
        found = layer(data)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert torch.equal(found, torch.nn.functional.linear(data, weight))
    assert library.calls[-2:] == [("linear", [99, 1, 0, 0]), ("linear", [])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(data)
        Sparse24Linear(weight, cache=_cache(tmp_path))(data)  # the file no longer has it
    assert library.calls[-1] == ("linear", [])


def test_an_error_of_another_kind_leaves_the_tuned_algorithm_alone(library, tmp_path):
    layer = Sparse24Linear(_weight(), cache=_cache(tmp_path))
    layer.cache.put(layer._key(3), [98, 1, 0, 0])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        layer(torch.ones(3, 48).bfloat16())
    assert layer.cache.get(layer._key(3)) == [98, 1, 0, 0]


@pytest.mark.parametrize("backend", ["library", "fallback"])
def test_the_state_dict_is_portable(request, tmp_path, backend):
    request.getfixturevalue(backend)
    weight, bias, data = _weight(), torch.randn(32).bfloat16(), torch.randn(3, 48).bfloat16()
    layer = Sparse24Linear(weight, bias, cache=_cache(tmp_path))
    state = layer.state_dict()
    assert list(state) == ["values", "metadata", "bias"]
    assert torch.equal(decompress24(state["values"], state["metadata"]), weight)
    for assign in (False, True):
        other = Sparse24Linear(torch.zeros_like(weight), torch.zeros_like(bias), cache=_cache(tmp_path))
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(data), layer(data))
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        Sparse24Linear(_weight(16, 48), cache=_cache(tmp_path)).load_state_dict({key: state[key] for key in ("values", "metadata")})


@pytest.mark.parametrize("backend", ["library", "fallback"])
def test_the_compressed_weight_follows_the_module(request, tmp_path, backend):
    """To another dtype, and to a device that cannot multiply: there the module keeps its state dict."""
    request.getfixturevalue(backend)
    weight, bias, data = _weight(), torch.randn(32).bfloat16(), torch.randn(3, 48).bfloat16()
    layer = torch.nn.Sequential(Sparse24Linear(weight, bias, name="fc1", cache=_cache(tmp_path)))
    packed = layer[0]._packed
    assert layer.to("cpu")[0]._packed is packed
    layer.half()
    assert layer[0].dtype == layer[0].bias.dtype == torch.float16
    expected = torch.nn.functional.linear(data.half(), weight.half(), bias.half())
    assert torch.equal(layer(data.half()), expected)
    with pytest.raises(MaskLLMError, match=r"fc1: torch\.float32; wanted bfloat16 or float16"):
        layer.float()
    assert torch.equal(layer(data.half()), expected)
    layer.to("meta")
    with pytest.raises(MaskLLMError, match="fc1: on meta; 2:4 products need an NVIDIA GPU"):
        layer(data.half())
    with pytest.raises(MaskLLMError, match="fc1: on meta"):
        layer[0].tune(3)
    state = layer.state_dict()
    assert list(state) == ["0.values", "0.metadata", "0.bias"]
    assert torch.equal(decompress24(state["0.values"], state["0.metadata"]), weight.half())
    layer.to_empty(device="cpu")
    layer.load_state_dict({**state, "0.bias": bias.half()})
    assert torch.equal(layer(data.half()), expected)


def test_an_unaligned_bias_is_copied(library, tmp_path):
    bias = torch.randn(33).bfloat16()[1:]
    layer = Sparse24Linear(_weight(), bias, cache=_cache(tmp_path))
    assert layer.bias.data_ptr() % 16 == 0
    assert torch.equal(layer.bias, bias)
