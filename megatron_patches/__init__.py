"""Every change this project makes to Megatron Core's behaviour, for versions 0.16 to 0.19.

Every entry point that may run Megatron calls `import_megatron()` before anything imports Megatron Core, and `apply()` before the
first use of Megatron Core. If there is a CUDA device, the patches of `megatron_patches.cpu` are not applied.
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
"""Packages that upstream uses whenever it can import them, even for tensors on a CPU. `amp_C` has Apex's kernels."""

_applied = False


def import_megatron() -> None:
    """Silence the warnings of Megatron Core and of its imports. If there is no CUDA device, import it without the CUDA-only parts.

    The CUDA-only parts are:
    * the packages of CUDA_ONLY: nothing in this process can import them afterwards;
    * `torch.compile`: on import, upstream (`megatron.core.jit.jit_fuser`) decorates its fused functions with it. That loads the
      whole compiler, which takes seconds in each process, and only the CUDA configurations call these functions.
    """
    # On a machine without a GPU, a CUDA build of torch warns once per process when this module of it is imported.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Megatron warns that it cannot save a dataset's index files if its settings give no directory for them.
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)
    # Megatron warns once per module that Transformer Engine and Apex are missing, and about its internal deprecations.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    if not torch.cuda.is_available():
        for package in CUDA_ONLY:
            sys.modules.setdefault(package, None)  # every later import of it raises ImportError
        with mock.patch.object(torch, "compile", _leave_uncompiled):
            importlib.import_module("megatron.core.models.gpt")


def apply() -> None:
    """Apply the patches that this machine needs; later calls do nothing."""
    global _applied
    if _applied:
        return
    from megatron_patches import checkpoints, cpu, optimizer, recomputation

    anywhere = [*checkpoints.PATCHES, *optimizer.PATCHES, *recomputation.PATCHES]
    for patch in [*anywhere, *(() if torch.cuda.is_available() else cpu.PATCHES)]:
        patch.function()
    _applied = True


def _leave_uncompiled(function: Callable | None = None, **_: Any) -> Callable:
    return (lambda decorated: decorated) if function is None else function
