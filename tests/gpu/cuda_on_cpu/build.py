"""Builds the CUDA kernels and their operators for the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SANITIZERS = "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow"
"""Of UndefinedBehaviorSanitizer what concerns memory and integers. All of it takes twice the time to compile."""


def build(folder: Path, sources: Path = ROOT / "csrc") -> Path:
    """The library with `maskllm_emulated::*`, made in `folder` from the sources in `sources`. Needs g++."""
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O0", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-I{HERE}", f"-I{sources}"]
    torch_includes = [f"-isystem{torch_folder / path}" for path in ("include", "include/torch/csrc/api/include")]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        kernels = source.suffix == ".cu"
        options = [SANITIZERS, "-fno-sanitize-recover=all"] if kernels or source.stem == "emulator" else torch_includes
        subprocess.run(["g++", *flags, *options, *(["-x", "c++"] if kernels else []), "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        largest_first = sorted(sources.glob("cuda/*.cu"), key=lambda path: -path.stat().st_size)
        objects = list(pool.map(compile_one, [HERE / "operators.cpp", *largest_first, HERE / "emulator.cpp"]))
    library = folder / "kernels_on_cpu.so"
    torch_libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-shared", SANITIZERS, *objects, *torch_libraries, "-o", str(library)], check=True)
    return library


def sanitized_environment() -> dict[str, str]:
    """The environment of a process that may load such a library."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
