"""The CUDA sources compile: needs nvcc but no GPU and no CUDA build of torch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"))
if NVCC and "--Ofast-compile" not in subprocess.run([NVCC, "--help"], capture_output=True, text=True, check=False).stdout:
    NVCC = None

ARCHITECTURES = ("80", "86", "89", "90", "100")
"""Those that the Dockerfile builds for."""


def compile_source(source: str, output: Path, architectures: tuple[str, ...], *flags: str) -> str:
    """Compile a source, without a warning, with setup.py's flags and `flags`; returns what nvcc says."""
    targets = [flag for arch in architectures for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    command = [
        NVCC,
        "-std=c++20",
        "-O3",
        *targets,
        "-Werror",
        "all-warnings",
        *flags,
        "-c",
        str(SOURCES / source),
        "-o",
        str(output),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc that knows --Ofast-compile")
@pytest.mark.parametrize("source", sorted(path.name for path in SOURCES.glob("*.cu")))
def test_kernels_compile_for_every_architecture(source, tmp_path):
    compile_source(
        source, tmp_path / "out.o", ARCHITECTURES, "-Ofc", "max", "--threads", "0"
    )  # hardly optimized: a fifth of the time


@pytest.mark.long
@pytest.mark.skipif(NVCC is None, reason="needs nvcc that knows --Ofast-compile")
def test_registers_of_the_2_4_kernels_do_not_spill_to_memory(tmp_path):
    kernel, found = "", 0
    for line in compile_source("masked_weight.cu", tmp_path / "out.o", ("80", "90"), "-Xptxas", "-v").splitlines():
        kernel = line if "Compiling entry function" in line else kernel
        if "spill stores" in line and "TwoOfFour" in kernel:
            found += 1
            assert "0 bytes spill stores, 0 bytes spill loads" in line, kernel
    assert found
