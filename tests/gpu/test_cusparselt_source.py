"""csrc/cuda/cusparselt.cpp on the CPU: compiled against stand-ins for cuSPARSELt (`cusparselt_on_cpu`) and CUDA (`cuda_on_cpu`)."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import maskllm.ops.sparse24  # noqa: F401  (defines the operators)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch: its headers have no CUDA in them"),
]

ROOT = Path(__file__).parents[2]
FAKES = [Path(__file__).parent / folder for folder in ("cusparselt_on_cpu", "cuda_on_cpu")]
EXPORTS = """
extern "C" const char* take_calls() { static std::string taken; taken.swap(fake::calls); fake::calls.clear(); return taken.c_str(); }
extern "C" int live() { return fake::live; }
"""


class Library:
    def __init__(self, path: Path):
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.take_calls.restype = ctypes.c_char_p

    def calls(self) -> list[str]:
        """The calls since the last question."""
        return self._library.take_calls().decode().splitlines()

    def live(self) -> int:
        return self._library.live()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cusparselt")
    source = (ROOT / "csrc" / "cuda" / "cusparselt.cpp").read_text()
    assert source.count("TORCH_LIBRARY_IMPL(maskllm, CUDA,") == 1
    (folder / "on_cpu.cpp").write_text(
        source.replace("TORCH_LIBRARY_IMPL(maskllm, CUDA,", "TORCH_LIBRARY_IMPL(maskllm, CPU,") + EXPORTS
    )
    torch_folder = Path(torch.__file__).parent
    includes = [
        *(f"-I{folder}" for folder in FAKES),
        *(f"-isystem{torch_folder / path}" for path in ("include", "include/torch/csrc/api/include")),
    ]
    flags = [
        "-std=c++20",
        "-O0",
        "-fPIC",
        "-shared",
        "-DMASKLLM_CUSPARSELT=1",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    command = ["g++", *flags, *includes, str(folder / "on_cpu.cpp"), "-o", str(folder / "on_cpu.so"), *libraries]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert result.returncode == 0, result.stderr
    return Library(folder / "on_cpu.so")


def compress(weight):
    return torch.ops.maskllm.cusparselt_compress(weight)


def linear(input, compressed, bias=None, activation="", algorithm=(), out=32):
    return torch.ops.maskllm.cusparselt_linear(input, compressed, out, bias, activation, algorithm)


def search(input, compressed, bias=None, activation=""):
    return torch.ops.maskllm.cusparselt_search(input, compressed, 32, bias, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_any_number_of_tokens_with_one_plan_each(library, dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(32, 48).to(dtype), torch.randn(32).to(dtype)
    compressed = compress(weight)
    library.calls()
    for tokens in (1, 7, 8, 9, 33):
        for offset in (None, bias):
            for activation, apply in (("", lambda x: x), ("relu", torch.relu), ("gelu", torch.nn.functional.gelu)):
                for _ in range(3):
                    data = torch.randn(tokens, 48).to(dtype)
                    expected = torch.nn.functional.linear(data.double(), weight.double(), None if offset is None else bias.double())
                    expected = torch.nn.functional.gelu(expected, approximate="tanh") if activation == "gelu" else apply(expected)
                    found = linear(data, compressed, offset, activation)
                    assert found.is_contiguous()
                    torch.testing.assert_close(found, expected.to(dtype))
    calls = library.calls()
    assert calls.count("multiply") == 5 * 2 * 3 * 3
    assert sum(call.startswith("plan") for call in calls) == 3 * 2 * 3  # for 8, 16 and 40 tokens


def test_other_strides_and_starts_are_copied(library):
    weight, flat = torch.randn(32, 48).half(), torch.randn(48 * 8 + 1).half()
    for data in (flat[1:].view(8, 48), flat[:-1].view(48, 8).T):
        torch.testing.assert_close(linear(data, compress(weight)), torch.nn.functional.linear(data, weight), rtol=1e-2, atol=1e-2)


def test_split_k_has_a_mode_and_buffers_only_above_1(library):
    compressed, few, many = compress(torch.randn(32, 64).half()), torch.randn(8, 64).half(), torch.randn(32, 64).half()
    assert search(few, compressed) == [5, 1, 0, 0]
    assert search(many, compressed) == [5, 4, 1, 2]
    library.calls()
    linear(few, compressed, algorithm=[5, 1, 3, 3])
    linear(few, compressed, algorithm=[5, -1, 3, 3])
    linear(few, compressed, algorithm=[5, 4, 1, 2])
    assert library.calls() == ["plan 8 5 1 0 0", "multiply", "plan 8 5 -1 0 0", "multiply", "plan 8 5 4 1 2", "multiply"]


@pytest.mark.parametrize("algorithm", [[99, 1, 0, 0], [49, 1, 0, 0], [5, 1], [1 << 40, 1, 0, 0]])
def test_a_refused_algorithm_leaves_nothing_behind(library, algorithm):
    compressed, data = compress(torch.randn(32, 80).half()), torch.randn(8, 80).half()
    before = library.live()
    with pytest.raises(RuntimeError, match=r"^cuSPARSELt: "):
        linear(data, compressed, algorithm=algorithm)
    assert library.live() == before


def test_the_number_of_kept_plans_is_bounded(library):
    compressed, data, found = compress(torch.randn(32, 16).half()), torch.randn(8, 16).half(), []
    for number in range(1200):
        linear(data, compressed, algorithm=[number % 40, 2 + number // 40, 1, 1])
        found.append(library.live())
    assert 5 * 1000 < max(found) <= 5 * 1024 + 1  # three matrices, a selection and a plan each; the handle


def test_arguments_that_do_not_fit_are_refused(library):
    weight, data, bias = torch.randn(32, 48).half(), torch.randn(8, 48).half(), torch.zeros(33).half()
    compressed = compress(weight)
    moved = torch.zeros(compressed.numel() + 1, dtype=torch.uint8)[1:]
    for work, message in (
        (lambda: linear(data.float(), compressed), "Float; wanted Half or BFloat16"),
        (lambda: linear(data.char(), compressed), "Char; wanted Half or BFloat16"),
        (lambda: linear(data[0], compressed), "wanted .tokens, in."),
        (lambda: linear(data[:0], compressed), "tokens > 0"),
        (lambda: linear(data, compressed[:-16]), "the compressed weight has 3056 bytes; this GPU wants 3072"),
        (lambda: linear(data, moved), "multiple of 16 bytes"),
        (lambda: linear(data, compressed.char()), "is Char on cpu; wanted contiguous Byte"),
        (lambda: linear(data, compressed, bias[:32].float()), "bias must be .* of Half"),
        (lambda: linear(data, compressed, bias[:31]), r"bias must be a contiguous \[32\]"),
        (lambda: linear(data, compressed, bias[1:]), "multiple of 16 bytes"),
        (lambda: linear(data, compressed, activation="silu"), "wanted relu or gelu"),
        (lambda: compress(weight.float()), "Float; wanted Half or BFloat16"),
        (lambda: compress(weight.char()), "Char; wanted Half or BFloat16"),
        (lambda: compress(weight.T), "wanted a contiguous .out, in."),
        (lambda: compress(torch.zeros(32 * 48 + 1).half()[1:].view(32, 48)), "multiple of 16 bytes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            work()
