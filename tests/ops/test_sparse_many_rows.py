"""Products of many rows on CUDA: torch's product or cuSPARSELt's, whichever was faster. The CPU stands in for the GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from maskllm.ops import Layout, sparse_many_rows, sparse_pack
from maskllm.ops.algorithm_cache import AlgorithmCache
from maskllm.ops.sparse_linear import TENSORS
from maskllm.patterns import Pattern

LAYOUT = Layout(Pattern(2, 4), 16)


class Library:
    """Stands in for cuSPARSELt and for the clock: `milliseconds` are what the next measurements find, `calls` what was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.milliseconds: list[float] = []
        self.refused: list[int] | None = None
        self.error = "cuSPARSELt: not supported\nmore"

    def compress(self, weight):
        self.calls.append("compress")
        return weight.clone()

    def linear(self, data, compressed, out_features, bias, activation, algorithm):
        self.calls.append(f"linear {algorithm}")
        if algorithm == self.refused:
            raise RuntimeError(self.error)
        return torch.nn.functional.linear(data, compressed, bias)

    def search(self, data, compressed, out_features, bias, activation):
        self.calls.append("search")
        return [7, 1, 0, 0]

    def measure(self, work) -> float:
        work()
        return self.milliseconds.pop(0)


@pytest.fixture
def library(monkeypatch, tmp_path):
    fake = Library()
    module = sparse_many_rows
    monkeypatch.setattr(module, "can_multiply", lambda device: True)
    monkeypatch.setattr(module, "kernels", lambda: SimpleNamespace(has_cusparselt=True))
    monkeypatch.setattr(module, "_milliseconds", fake.measure)
    monkeypatch.setattr(module, "_cache", lambda: AlgorithmCache(tmp_path / "cusparselt.json"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.library._scoped_library("maskllm", "IMPL") as implementations:
        for name in ("compress", "linear", "search"):
            implementations.impl(f"cusparselt_{name}", getattr(fake, name), "CPU")
        yield fake


def product(rows: int, layout: Layout = LAYOUT, out: int = 32, dtype: torch.dtype = torch.bfloat16) -> None:
    """Check a product of `rows` rows."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(out, 48, generator=generator).view(out, 12, 4)
    weight[..., 2:] = 0
    weight = weight.flatten(1).to(torch.bfloat16 if layout.bits == 16 else torch.float32)
    tensors = sparse_pack(weight, layout)
    data, bias = torch.randn(rows, 48, generator=generator).to(dtype), torch.randn(out, generator=generator).to(dtype)
    found = torch.ops.maskllm.sparse_linear_many_rows(data, *map(tensors.get, TENSORS), bias, *layout.numbers)
    assert torch.equal(found, torch.nn.functional.linear(data, weight.to(dtype), bias))


def test_the_faster_product_is_found_once_for_each_power_of_two(library):
    library.milliseconds = [3.0, 1.0, 2.0]  # torch's product, the compression, both parts of cuSPARSELt's
    product(100)
    assert library.calls == ["compress", "compress", "search", "compress", "linear [7, 1, 0, 0]", "compress", "linear [7, 1, 0, 0]"]
    library.calls.clear()
    product(128)
    assert library.calls == ["compress", "linear [7, 1, 0, 0]"]
    library.calls.clear()
    library.milliseconds = [3.0, 1.0, 3.5]
    product(129)
    assert "search" in library.calls
    library.calls.clear()
    product(256)
    assert library.calls == []


def test_an_algorithm_that_the_library_refuses_is_forgotten_and_torch_multiplies(library, tmp_path):
    library.milliseconds = [3.0, 1.0, 2.0]
    product(100)
    library.refused = [7, 1, 0, 0]
    with pytest.warns(RuntimeWarning, match=r"the algorithm \[7, 1, 0, 0\] of .* \(cuSPARSELt: not supported\); it is removed"):
        product(100)
    assert json.loads((tmp_path / "cusparselt.json").read_text()) == {}
    library.refused, library.milliseconds = None, [3.0, 1.0, 2.0]
    product(100)  # measures again
    library.refused, library.error = [7, 1, 0, 0], "CUDA out of memory"
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        product(100)


def test_a_cache_that_cannot_be_written_does_not_stop_the_product(library, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    cache = AlgorithmCache(tmp_path / "file" / "cusparselt.json")
    monkeypatch.setattr(sparse_many_rows, "_cache", lambda: cache)
    library.milliseconds = [3.0, 1.0, 2.0]
    with pytest.warns(RuntimeWarning, match="MASKLLM_CACHE_DIR"):
        product(100)
    library.calls.clear()
    product(128)
    assert library.calls == ["compress", "linear [7, 1, 0, 0]"]


def test_nothing_is_searched_if_compressing_alone_takes_longer(library):
    library.milliseconds = [1.0, 1.0]
    product(32)
    product(30)
    assert library.calls == ["compress"]


def test_nothing_is_measured_while_a_graph_is_captured(library, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    product(32)
    assert library.calls == []


@pytest.mark.parametrize(
    ("layout", "out", "dtype"),
    [
        (Layout(Pattern(2, 4), 32), 32, torch.float32),
        (Layout(Pattern(2, 4), 16), 24, torch.bfloat16),
        (Layout(Pattern(4, 8), 16), 32, torch.bfloat16),
        (Layout(None, 16), 32, torch.bfloat16),
    ],
)
def test_what_cusparselt_cannot_multiply_is_not_measured(library, layout, out, dtype):
    product(32, layout, out, dtype)
    assert library.calls == []
