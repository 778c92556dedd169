"""The CUDA sources compile: needs nvcc but no GPU and no CUDA build of torch."""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"))
if NVCC and "--Ofast-compile" not in subprocess.run([NVCC, "--help"], capture_output=True, text=True, check=False).stdout:
    NVCC = None

ARCHITECTURES = ("80", "86", "89", "90", "100")
"""The architectures that the Dockerfile builds for."""


def compile_source(source: str, output: Path, architectures: tuple[str, ...], *flags: str) -> str:
    """Compile a source with setup.py's flags and `flags`, with warnings as errors; returns nvcc's messages."""
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


QUICK = ("-Ofc", "max", "--threads", "0")
"""Hardly any optimization: a fifth of the time."""
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc that knows --Ofast-compile")


@needs_nvcc
@pytest.mark.parametrize("source", sorted(path.name for path in SOURCES.glob("*.cu")))
@pytest.mark.parametrize(
    "architectures", [ARCHITECTURES[:1], pytest.param(ARCHITECTURES, marks=pytest.mark.long)], ids=["oldest", "all"]
)
def test_kernels_compile(source, architectures, tmp_path):
    """The sources have no code for single architectures, so the oldest one, with the fewest features, stands for all."""
    compile_source(source, tmp_path / "out.o", architectures, *QUICK)


@needs_nvcc
@pytest.mark.long
def test_registers_of_the_2_4_kernels_do_not_spill_to_memory(tmp_path):
    kernel, found = "", 0
    for line in compile_source("masked_weight.cu", tmp_path / "out.o", ("80", "90"), "-Xptxas", "-v").splitlines():
        kernel = line if "Compiling entry function" in line else kernel
        if "spill stores" in line and "TwoOfFour" in kernel:
            found += 1
            assert "0 bytes spill stores, 0 bytes spill loads" in line, kernel
    assert found


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ([(0, 8)], None),
        ([(1, 0)], None),
        ([(0, 7)], r"0/cusparseLt\.h is version 0\.7, older than 0\.8"),
        ([(0, 7), (0, 8)], r"0/cusparseLt\.h is version 0\.7"),  # the compiler takes the first
        ([None], r"0/cusparseLt\.h states no version"),
        ([], "cuSPARSELt's header was not found"),
    ],
)
def test_the_build_uses_cusparselt_only_with_a_header_that_has_its_functions(tmp_path, monkeypatch, versions, reason):
    monkeypatch.setenv("MASKLLM_BUILD_CUDA", "0")
    monkeypatch.setattr("setuptools.setup", lambda **_arguments: None)
    build = runpy.run_path(str(SOURCES.parents[1] / "setup.py"))
    folders = [str(tmp_path / "none")]
    for number, version in enumerate(versions):
        folder = tmp_path / str(number)
        folder.mkdir()
        major, minor = version or (0, 0)
        defined = f"#define CUSPARSELT_VER_MAJOR {major}\n#define CUSPARSELT_VER_MINOR   {minor}\n" if version else "// nothing\n"
        (folder / "cusparseLt.h").write_text(defined)
        folders.append(str(folder))
    found = build["why_no_cusparselt"](folders)
    assert found is None if reason is None else re.search(reason, found)
