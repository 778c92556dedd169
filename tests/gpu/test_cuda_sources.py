"""The CUDA sources compile: needs nvcc but no GPU and no CUDA build of torch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"))


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted(path.name for path in SOURCES.glob("*.cu")))
def test_kernels_compile_for_sm_80_and_sm_90(source, tmp_path):
    """Without a warning, and without the 2:4 kernels' registers spilling to memory."""
    targets = [flag for arch in ("80", "90") for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    command = [NVCC, "-std=c++17", "-O3", *targets, "-Werror", "all-warnings", "-Xptxas", "-v", "-c", str(SOURCES / source)]
    result = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernel = ""
    for line in result.stderr.splitlines():
        kernel = line if "Compiling entry function" in line else kernel
        if "spill stores" in line and "TwoOfFour" in kernel:
            assert "0 bytes spill stores, 0 bytes spill loads" in line, kernel
