"""Loads the compiled kernels, and refuses kernels that were built for another torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import mmap
import re
import warnings
from pathlib import Path
from types import ModuleType

import torch

from maskllm.errors import MaskLLMError

_REBUILD = "rebuild it with `pip install --no-build-isolation -e .` in the source tree, or reinstall the package"


def check_built_for(path: Path, torch_version: str, cuda_version: str | None) -> None:
    """Raise MaskLLMError unless the extension at `path` was built with the running torch, and with its CUDA if it has CUDA kernels.

    The versions are read from the file without loading it: code built against another torch may crash the process.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb"maskllm kernels built with torch=([^;]*);(?:cuda=([^;]*);)?", content)
        built, built_cuda = (part.decode() if part is not None else None for part in found.groups()) if found else ("?", None)
    running = torch_version.split("+")[0]
    if built != running:
        raise MaskLLMError(f"{path}: built with torch {built}, running with torch {torch_version}; {_REBUILD}")
    if built_cuda is not None and built_cuda != cuda_version:
        raise MaskLLMError(f"{path}: built for CUDA {built_cuda}, this torch is for CUDA {cuda_version}; {_REBUILD}")


@functools.cache
def kernels() -> ModuleType | None:
    """The extension module `maskllm.ops._kernels`, or None if it was not built. Its import registers the compiled operators.

    Raises MaskLLMError if it was built for another torch or cannot be loaded.
    """
    spec = importlib.util.find_spec("maskllm.ops._kernels")
    if spec is None or spec.origin is None:
        return None
    check_built_for(Path(spec.origin), torch.__version__, torch.version.cuda)
    try:
        return importlib.import_module("maskllm.ops._kernels")
    except ImportError as error:
        raise MaskLLMError(f"{spec.origin}: cannot be loaded ({error}); {_REBUILD}") from error


def has_kernels(device_type: str) -> bool:
    """Whether there are compiled kernels for tensors on a "cpu" or "cuda" device."""
    module = kernels()
    return module is not None and (device_type == "cpu" or (device_type == "cuda" and module.cuda_version is not None))


@functools.cache
def warn_if_reference(device_type: str) -> None:
    """Warn once per kind of device if operators there run the PyTorch reference, and say how to build the kernels."""
    if not has_kernels(device_type) and device_type != "meta":
        option = "MASKLLM_BUILD_CUDA=1 " if device_type == "cuda" else ""
        warnings.warn(
            f"maskllm was built without {device_type} kernels; the PyTorch reference, several times slower, is in use. "
            f"With a compiler installed, `{option}pip install --no-build-isolation -e .` in the source tree builds them.",
            RuntimeWarning,
            stacklevel=3,
        )
