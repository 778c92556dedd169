"""The parts of the packaging that pyproject.toml cannot express: the compiled kernels, and the torch version they require.

MASKLLM_BUILD_CUDA=1 requires the CUDA kernels (for TORCH_CUDA_ARCH_LIST), 0 omits them. If it is unset, they are built if torch is
a CUDA build and nvcc has the same CUDA version. Without a C++ compiler or torch, the package is installed without kernels and uses
its PyTorch reference.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

CSRC = Path("csrc")


def say(message: str) -> None:
    """Print a message of the build."""
    print(f"maskllm: {message}", file=sys.stderr)


def why_no_compiler() -> str | None:
    """Why no kernels can be compiled, or None."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment"
    return None


def why_no_cuda() -> str | None:
    """Why the CUDA kernels cannot be compiled, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "nvcc was not found (set CUDA_HOME)"
    text = subprocess.run([str(Path(CUDA_HOME) / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.", text)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc belongs to CUDA {release[1] if release else '(unknown version)'} and torch to CUDA {torch.version.cuda}"
    return None


def why_no_cusparselt(folders: list[str]) -> str | None:
    """Why the calls of cuSPARSELt cannot be compiled with the header that is first in `folders`, or None."""
    header = next((path for path in (Path(folder) / "cusparseLt.h" for folder in folders) if path.exists()), None)
    if header is None:
        return "cuSPARSELt's header was not found"
    text = header.read_text(encoding="utf-8", errors="replace")
    major, minor = (re.search(rf"#define\s+CUSPARSELT_VER_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR"))
    if major is None or minor is None:
        return f"{header} states no version"
    if (int(major[1]), int(minor[1])) < (0, 8):
        return f"{header} is version {major[1]}.{minor[1]}, older than 0.8"
    return None


def toolkit_folders(variable: str, option: str) -> list[str]:
    """The folders with headers (INCLUDES, -I) or libraries (LIBRARIES, -L) of nvcc's toolkit, as nvcc reports them.

    They may lie outside of CUDA_HOME: the nvcc on the path may be a script that calls the real one.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    command = [str(Path(CUDA_HOME) / "bin" / "nvcc"), "--dryrun", "-c", str(CSRC / "cuda" / "matrix.cu")]
    steps = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(rf"^#\$ {variable}=(.*)$", steps, re.MULTILINE)
    return re.findall(rf'{option}([^"\s]+)', found[1]) if found else []


def kernels() -> dict:
    """The setup() arguments that build maskllm.ops._kernels; empty if nothing can be compiled."""
    forced = os.environ.get("MASKLLM_BUILD_CUDA", "")
    if forced not in ("", "0", "1"):
        raise SystemExit(f"MASKLLM_BUILD_CUDA={forced}: wanted 0, 1 or no value")
    reason = why_no_compiler()
    if reason is not None:
        if forced == "1":
            raise SystemExit(f"MASKLLM_BUILD_CUDA=1, but {reason}")
        say(f"{reason}: installing without compiled kernels; the slower PyTorch reference will be used")
        return {}

    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    reason = "MASKLLM_BUILD_CUDA=0" if forced == "0" else why_no_cuda()
    if forced == "1" and reason is not None:
        raise SystemExit(f"MASKLLM_BUILD_CUDA=1, but {reason}")
    with_cuda = reason is None
    say("building the CPU and CUDA kernels" if with_cuda else f"building the CPU kernels only: {reason}")

    sources = [CSRC / "bindings.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    # -fopenmp for the compiler only: at::parallel_for uses OpenMP pragmas, and torch has loaded an OpenMP runtime. Linking another
    # one would give the process a second thread pool. -fno-tree-pre: this pass turns the clamp in exp_of into a branch, and then
    # its loops are not vectorized for AVX2. -fstack-reuse=none: without it, GCC 12 lets two arrays of the AVX2 loops share memory
    # while both are in use.
    host_flags = [
        "-O3",
        "-std=c++20",
        "-fopenmp",
        "-fno-tree-pre",
        "-fstack-reuse=none",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
    ]
    macros = [("MASKLLM_TORCH_VERSION", f'"{torch.__version__.split("+")[0]}"')]
    flags = {"cxx": host_flags}
    includes, library_dirs, link = [], [], ["-Wl,-s"]
    if with_cuda:
        sources += [*sorted((CSRC / "cuda").glob("*.cu")), *sorted((CSRC / "cuda").glob("*.cpp"))]
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        macros.append(("MASKLLM_CUDA_VERSION", f'"{torch.version.cuda}"'))
        macros.append(("MASKLLM_CUDA_ARCHITECTURES", f'"{";".join(re.split("[; ]+", architectures))}"'))
        flags["nvcc"] = ["-O3", "-std=c++20"]
        # The toolkit's folders come first, then the CUDA headers and libraries in torch's nvidia-* packages: some toolkits have
        # little more than nvcc.
        packages = Path(torch.__file__).parent.parent / "nvidia"
        includes = [*toolkit_folders("INCLUDES", "-I"), *(str(path) for path in packages.glob("*/include"))]
        library_dirs = [*toolkit_folders("LIBRARIES", "-L"), *(str(path) for path in packages.glob("*/lib"))]
        reason = why_no_cusparselt([*includes, "/usr/include"])
        if reason is None:
            macros.append(("MASKLLM_CUSPARSELT", "1"))
            link.append("-l:libcusparseLt.so.0")  # torch has already loaded this file
        else:
            say(f"{reason}: Sparse24Linear will use torch's semi-structured tensors")
    extension = (CUDAExtension if with_cuda else CppExtension)(
        name="maskllm.ops._kernels",
        sources=[str(path) for path in sources],
        depends=[str(path) for pattern in ("*.h", "*.inl", "*.cuh") for path in sorted(CSRC.rglob(pattern))],
        define_macros=macros,
        extra_compile_args=flags,
        include_dirs=includes,
        library_dirs=library_dirs,
        extra_link_args=link,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def torch_requirement(built: bool) -> str:
    """The requirement for torch. A compiled extension works only with the torch release that it was built with."""
    if not built:
        return "torch>=2.6"
    import torch

    return f"torch=={torch.__version__.split('+')[0]}"


arguments = kernels()
setup(
    **arguments,
    install_requires=[
        torch_requirement(built=bool(arguments)),
        "megatron-core>=0.16,<0.20",
        # Tested: 5.22.2 and 5.24.0. With 5.20.2, the last tested one for Python 3.10, Gemma 2 has soft-capping only with eager attention.
        # Earlier ones also differ in partial rotary embeddings.
        "transformers>=5.22,<5.25; python_version >= '3.11'",
        "transformers>=5.20.2,<5.21; python_version < '3.11'",
        "safetensors>=0.4.5",
        "tokenizers>=0.23.1",
        "sentencepiece>=0.2",
        "gigatoken>=0.10",
        "backports.zstd>=1; python_version < '3.14'",
        "awkward>=2",
        # Megatron Core 0.17 and later, which need Python 3.12, import triton everywhere. CPU builds of torch do not install it.
        "triton>=3; python_version >= '3.12' and platform_system == 'Linux'",
        "numpy>=1.26",
        "tensorboard>=2.17",
        "tqdm>=4.66",
        "packaging",
        "psutil",
    ],
)
