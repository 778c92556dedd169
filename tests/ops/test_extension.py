"""The compiled extension: its arithmetic against Python's, another torch, one OpenMP runtime, and a process without it."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maskllm.errors import MaskLLMError
from maskllm.ops import NoiseKey, ShardMap
from maskllm.ops.extension import check_built_for, kernels
from maskllm.ops.noise import uniform_bits

needs_kernels = pytest.mark.skipif(kernels() is None, reason="the kernels were not built")


@needs_kernels
@pytest.mark.parametrize(("key", "sample"), itertools.product([0, 0xFEDCBA9876543210], [0, (1 << 40) + 3]))
def test_the_kernels_draw_the_same_integers_as_python(key, sample):
    for block, candidates in ((0, 6), (5, 4), ((1 << 55) + 12345, 70), ((1 << 32) - 1, 128)):
        expected = uniform_bits(NoiseKey(key, sample, ShardMap(1, block_offset=block)), 1, 1, candidates)
        assert kernels().draws(key, sample, block, candidates) == expected.flatten().tolist()


@needs_kernels
def test_exp_log_and_gumbel_are_within_two_units_in_the_last_place():
    unit = 2.0**-23
    x = -np.linspace(0, 87, 400001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(kernels().exp(x) / exact - 1).max() < 2 * unit
    assert kernels().exp(np.float32([-88, -1e4, -np.inf])).tolist() == [0, 0, 0]
    x = np.concatenate([np.geomspace(1.2e-38, 3e38, 400001), np.linspace(0.9, 1.1, 100001)]).astype(np.float32)
    x = x[x != 1]
    assert np.abs(kernels().log(x) / np.log(x.astype(np.float64)) - 1).max() < 2 * unit
    draws = np.arange(1 << 21, dtype=np.float32) + np.float32(0.5)
    exact = -np.log(-np.log(draws.astype(np.float64) * 2.0**-21))
    assert np.abs(kernels().gumbel(draws) - exact).max() < 16 * unit  # the largest are near 15


def _run(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **environment})


@needs_kernels
def test_one_openmp_runtime_is_loaded():
    code = (
        "import maskllm.ops, re; from pathlib import Path\n"
        "print(len({line.split()[-1] for line in Path('/proc/self/maps').read_text().splitlines()"
        " if re.search(r'lib(gomp|omp|iomp5)[^/]*[.]so', line)}))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    result = _run(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "1"


def test_another_torch_or_cuda_is_refused(tmp_path):
    extension = tmp_path / "_kernels.so"
    extension.write_bytes(b"\x7fELF..maskllm kernels built with torch=2.12.0;\0..")
    check_built_for(extension, "2.12.0+cpu", None)
    with pytest.raises(MaskLLMError, match=r"built with torch 2\.12\.0, running with torch 2\.13\.0\+cpu; rebuild"):
        check_built_for(extension, "2.13.0+cpu", None)
    extension.write_bytes(b"maskllm kernels built with torch=2.12.0;cuda=13.0;")
    check_built_for(extension, "2.12.0+cu130", "13.0")
    with pytest.raises(MaskLLMError, match=r"built for CUDA 13\.0, this torch is for CUDA None"):
        check_built_for(extension, "2.12.0+cpu", None)
    extension.write_bytes(b"something else")
    with pytest.raises(MaskLLMError, match=r"built with torch \?"):
        check_built_for(extension, "2.12.0", None)


def test_without_kernels_the_reference_runs_and_one_warning_says_so():
    """The process cannot find the extension module, as if it had not been built."""
    code = """
import importlib.util, warnings
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "maskllm.ops._kernels" else find(name, *rest)
import torch
from maskllm.ops import NoiseKey, ShardMap, compress24, decompress24, masked_weight, reference
from maskllm.patterns import Pattern
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        weight, logits = torch.randn(3, 8), torch.randn(3, 2, 6, requires_grad=True)
        key = NoiseKey(1, 0, ShardMap(2))
        masked = masked_weight(weight, logits, pattern=Pattern(2, 4), key=key, scale=1.0, temperature=1.0)
        masked.sum().backward()
        assert torch.equal(masked, reference.forward(weight, logits, Pattern(2, 4), key, 1.0, 1.0, False, False)[0])
        assert logits.grad is not None
print(*[str(warning.message) for warning in caught], sep="\\n")
"""
    result = _run(code)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.strip().splitlines()
    assert len(lines) == 1
    assert "without cpu kernels" in lines[0]
    assert "pip install --no-build-isolation" in lines[0]
