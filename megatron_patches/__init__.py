"""Every change this project makes to Megatron Core's behaviour, for versions 0.16 to 0.19.

Each entry point that may run Megatron calls `import_megatron()` before anything imports Megatron Core, and `apply()` before it uses it.
With a CUDA device `megatron_patches.cpu` is left out.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

CUDA_ONLY = ("transformer_engine", "apex", "amp_C")
"""Packages (the last is Apex's kernels) that upstream uses wherever they can be imported, for tensors on a CPU too."""

_applied = False


def import_megatron() -> None:
    """Silence the warnings of Megatron Core and what it imports and, where there is no CUDA device, import it without what needs one.

    That is CUDA_ONLY, which nothing can import in this process afterwards, and `torch.compile`: upstream
    (`megatron.core.jit.jit_fuser`) decorates its fused functions with it on import, which loads the whole compiler, seconds for each
    process, for functions that only the CUDA configurations call.
    """
    # A CUDA build of torch complains of a machine without a GPU, once a process, when an extension's builder is imported.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # It warns of index files of a dataset that it is told not to write.
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)
    # It warns once a module that Transformer Engine and Apex are missing, and of deprecations inside itself.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    if not torch.cuda.is_available():
        for package in CUDA_ONLY:
            sys.modules.setdefault(package, None)  # whose import is an ImportError from now on
        with mock.patch.object(torch, "compile", _leave_uncompiled):
            importlib.import_module("megatron.core.models.gpt")


def apply() -> None:
    """Apply the patches that this machine needs; later calls do nothing."""
    global _applied
    if _applied:
        return
    from megatron_patches import checkpoints, cpu, recomputation

    for patch in [*checkpoints.PATCHES, *recomputation.PATCHES, *(() if torch.cuda.is_available() else cpu.PATCHES)]:
        patch.function()
    _applied = True


def _leave_uncompiled(function: Callable | None = None, **_: Any) -> Callable:
    return (lambda decorated: decorated) if function is None else function
