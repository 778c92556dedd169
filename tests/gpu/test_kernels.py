"""The CUDA kernels, on a GPU or on the CPU under AddressSanitizer: the same cases (kernel_cases.py)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskllm.ops.extension import has_kernels
from tests.gpu.cuda_on_cpu.build import ROOT, build, sanitized_environment
from tests.gpu.kernel_cases import CASES, Backend

has_gpu = torch.cuda.is_available() and has_kernels("cuda")


FAULTS = {
    "a missing barrier": ("masked_weight.cu", "    __syncthreads();\n", ""),
    "an odd end read as a whole": ("masked_weight.cu", "whole = aligned && second", "whole = aligned"),
    "an address taken for aligned": ("masked_weight.cu", "aligned16(args.weight) && aligned16(args.logits) && ", ""),
    "a row that is not carried": ("masked_weight.cu", "      ++row;\n", ""),
    "a byte too many": (
        "matrix.cu",
        "const int64_t bytes = (blocks * p.m + 7) / 8;",
        "const int64_t bytes = blocks * p.m / 8 + 1;",
    ),
    "sums that are added before all warps have them": ("sparse.cu", "  __syncthreads();\n", ""),
    "tiles that are added before all warps have them": ("sparse_tiles.cu", "  __syncthreads();\n", ""),
    "inputs taken for aligned": ("sparse.cu", "reinterpret_cast<uintptr_t>(product.inputs) % 16 == 0 && ", ""),
    "another order of faults": ("sparse_check.cu", "fault) << kFaultShift", "fault) << 3"),
}
"""Faults of kernels that the cases must notice: source, text, and what replaces it."""


def run_on_cpu(library: Path) -> subprocess.CompletedProcess:
    """All cases, in a process under the sanitizers."""
    command = [sys.executable, "-m", "tests.gpu.kernel_cases", str(library)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=sanitized_environment(), check=False)


@pytest.mark.skipif(not has_gpu, reason="needs a CUDA GPU and its kernels")
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_a_gpu(name):
    torch.manual_seed(0)
    CASES[name](Backend(torch.ops.maskllm, torch.device("cuda")))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_on_the_cpu(tmp_path):
    result = run_on_cpu(build(tmp_path))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert result.stdout.endswith(f"{len(CASES)} cases\n")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_cases_notice_faults(fault, tmp_path):
    name, text, replacement = FAULTS[fault]
    sources = Path(shutil.copytree(ROOT / "csrc", tmp_path / "csrc"))
    source = sources / "cuda" / name
    assert text in source.read_text()
    source.write_text(source.read_text().replace(text, replacement, 1))
    assert run_on_cpu(build(tmp_path, sources)).returncode != 0
