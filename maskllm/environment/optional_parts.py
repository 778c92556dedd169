"""The optional parts of an installation: which are there, what each brings, and why one that is there cannot be used."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder

import torch

from maskllm.dtypes import dtype_name
from maskllm.errors import MaskLLMError, first_line

TRANSFORMER_IMPLS = ("local", "transformer_engine")
"""Megatron-LM's `--transformer-impl`: whose norms and attention a model uses. The masked linears are this project's in both."""


@dataclass(frozen=True)
class OptionalPart:
    """A package that makes training faster and that training does without."""

    name: str
    brings: str
    """What it does for this program, in words."""
    version: str | None
    """None where it is not installed."""
    problem: str | None
    """Why it cannot be used, None where it can."""

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}; it would bring {self.brings}"


@functools.cache
def transformer_engine() -> OptionalPart:
    """NVIDIA's Transformer Engine. It is imported here, which takes seconds where it is installed."""
    return _part("transformer-engine", "transformer_engine", ["transformer_engine.pytorch"], "fused norms, attention and Adam")


@functools.cache
def apex() -> OptionalPart:
    """NVIDIA's Apex, which serves where there is no Transformer Engine: its norms with `local`, its Adam to Megatron Core."""
    modules = ["apex.optimizers", "apex.normalization", "amp_C", "fused_layer_norm_cuda"]  # the last two are its kernels
    return _part("apex", "apex", modules, "fused norms and Adam")


def _part(name: str, package: str, modules: list[str], brings: str) -> OptionalPart:
    hidden = sys.modules.get(package, package) is None  # from Megatron on a CPU: see `megatron_patches.import_megatron`
    if (PathFinder if hidden else importlib.util).find_spec(package) is None:
        return OptionalPart(name, brings, None, "not installed")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = "unknown version"
    if not torch.cuda.is_available():
        return OptionalPart(name, brings, version, "needs a CUDA device, and there is none")
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:  # a library of another CUDA or torch fails in its own ways
        reason = first_line(error)
        return OptionalPart(name, brings, version, f"{version} is installed but cannot be imported ({reason})")
    return OptionalPart(name, brings, version, None)


def resolve_transformer_impl(requested: str | None) -> str:
    """The one of TRANSFORMER_IMPLS that a run uses: the one asked for or, with None, Transformer Engine's where it can be used.

    Raises MaskLLMError where Transformer Engine is asked for and cannot be used: nothing stands in for it.
    """
    if requested not in (None, *TRANSFORMER_IMPLS):
        raise MaskLLMError(f"--transformer-impl {requested}: wanted one of {', '.join(TRANSFORMER_IMPLS)}")
    if requested == "local":
        return requested
    problem = transformer_engine().problem
    if problem is None:
        return "transformer_engine"
    if requested is None:
        return "local"
    raise MaskLLMError(
        f"--transformer-impl {requested}: transformer-engine: {problem}; mend that (`maskllm doctor` says what is there), or train "
        "with --transformer-impl local"
    )


def computes_natively(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products in `dtype`; without, torch is many times slower there than in fp32."""
    if dtype is torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype is torch.float16:
        return getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)()
    return True


def slow_dtype(dtype: torch.dtype) -> str | None:
    """What is to be said of a run that computes in `dtype` where that is slow, None where it is not."""
    if torch.cuda.is_available() or computes_natively(dtype):
        return None
    return (
        f"this CPU has no instructions for {dtype_name(dtype)} and is many times slower in it; --params-dtype fp32 computes with the same "
        "weights"
    )


def uses_apex_norms() -> bool:
    """Whether the norms of `--transformer-impl local` are Apex's fused ones; else they are torch's."""
    return apex().problem is None


def startup_line(transformer_impl: str, *, low_precision: bool = False) -> str:
    """What a run says about itself when it starts: the device and the backend, whose norms, attention and Adam it uses, and which
    optional parts are missing. `low_precision`: whether it keeps logits or moments in fewer bits than fp32."""
    from megatron.core.optimizer import Adam

    from maskllm.ops.extension import has_kernels

    if transformer_impl == "transformer_engine":
        norms = attention = "Transformer Engine's"
    else:
        norms, attention = "Apex's" if uses_apex_norms() else "torch's", "torch's"
    library = Adam.__module__.partition(".")[0]
    adam = (
        "MaskLLM's" if low_precision else {"transformer_engine": "Transformer Engine's", "apex": "Apex's"}.get(library, "torch's")
    )
    missing = [str(part) for part in (transformer_engine(), apex()) if part.problem is not None]
    visible = torch.cuda.is_available()
    where = f"{torch.cuda.get_device_name()} with NCCL" if visible else "CPU with gloo, no GPU visible"
    device = "cuda" if visible else "cpu"
    if not has_kernels(device):
        missing.append(f"{device} kernels: not built; they would bring masks several times faster than the PyTorch reference")
    used = f"norms are {norms}, attention is {attention} (--transformer-impl {transformer_impl}), Adam is {adam}"
    return "; ".join([where, used, *missing])
