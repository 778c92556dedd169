"""`maskllm doctor`: what this installation and this machine have, what is missing, and whether training can run.

Packages that may be missing or broken are imported inside functions, so that this module can report on them.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from maskllm import __version__
from maskllm.errors import MaskLLMError, first_line

OLDEST_PYTHON = (3, 10)


@dataclass
class Diagnosis:
    """What was found."""

    found: dict[str, Any] = field(default_factory=dict)
    """Name of a part -> JSON value, None if the part is missing."""
    missing: list[str] = field(default_factory=list)
    """Missing parts that training does not need, each with what it would bring."""
    problems: list[str] = field(default_factory=list)
    """Why training cannot run; empty if it can."""

    def lines(self) -> list[str]:
        """The diagnosis as text."""
        width = max(map(len, self.found)) + 2
        lines = [f"{name:{width}}{_text(value)}" for name, value in self.found.items()]
        lines += [f"missing       {text}" for text in self.missing]
        lines += [f"problem       {text}" for text in self.problems]
        return lines


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value)) or "-"
    return str(value)


def examine() -> Diagnosis:
    """Look at this process's Python, its packages, the kernels, the GPUs and the compilers."""
    diagnosis = Diagnosis()
    found = diagnosis.found
    found["maskllm"] = f"{__version__} in {Path(__file__).parents[1]}"
    found["python"] = f"{platform.python_version()} in {sys.prefix}"
    found["system"] = f"{platform.platform()}, {os.cpu_count()} hardware threads"
    if sys.version_info < OLDEST_PYTHON:
        diagnosis.problems.append(f"Python {platform.python_version()}: wanted {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    _packages(diagnosis)
    torch = _import(diagnosis, "torch")
    if torch is not None:
        _training(diagnosis)
        _gpus(diagnosis, torch)
        _kernels(diagnosis, torch)
        _optional_parts(diagnosis)
    _compilers(diagnosis)
    return diagnosis


def _import(diagnosis: Diagnosis, name: str) -> ModuleType | None:
    """Import a module. A failure becomes a problem, unless a problem already names the package that is missing."""
    try:
        return importlib.import_module(name)
    except MaskLLMError:  # the kernels do not fit; `_kernels` reports it
        return None
    except Exception as error:  # a broken installation raises nearly anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and any(problem.startswith(f"{missing}: ") for problem in diagnosis.problems):
            return None
        problem = f"{name}: not installed" if missing == name else f"{name} cannot be imported ({first_line(error)})"
        diagnosis.problems.append(problem)
        return None


def _packages(diagnosis: Diagnosis) -> None:
    """Compare the installed packages with what the distribution `maskllm` requires."""
    try:
        requirements = metadata.requires("maskllm") or []
    except metadata.PackageNotFoundError:
        diagnosis.found["packages"] = None
        diagnosis.problems.append("maskllm is not installed, so its requirements are not known; install it with pip")
        return
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        diagnosis.problems.append("packaging: not installed; without it the versions of the other packages cannot be compared")
        return
    diagnosis.found["packages"] = versions = {}
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted = requirement.name, str(requirement.specifier)
        version = versions[name] = _version(name)
        if version is None:
            diagnosis.problems.append(f"{name}: not installed, wanted {name}{wanted}")
        elif not requirement.specifier.contains(version, prereleases=True):
            diagnosis.problems.append(f"{name}: {version} is installed, wanted {name}{wanted}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _training(diagnosis: Diagnosis) -> None:
    """Import what a training process imports: Megatron first, then the loop and TensorBoard's writer, which every recipe uses."""
    try:
        importlib.import_module("megatron_patches").import_megatron()
        importlib.import_module("megatron.core.models.gpt")
    except Exception as error:
        if not any(problem.startswith("megatron-core: ") for problem in diagnosis.problems):
            diagnosis.problems.append(f"megatron-core cannot be imported ({first_line(error)})")
        return
    for name in ("maskllm.training.loop", "torch.utils.tensorboard"):
        _import(diagnosis, name)


def _gpus(diagnosis: Diagnosis, torch: ModuleType) -> None:
    from maskllm.environment.cpu_speed import slow_dtype_warning

    found = diagnosis.found
    found["cuda"] = torch.version.cuda
    # nvidia-smi prints one line for each GPU.
    listed = (_output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "").splitlines()
    found["driver"] = listed[0] if listed else None
    visible = torch.cuda.is_available()
    count = torch.cuda.device_count() if visible else 0
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    found["gpus"] = [
        {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1), "capability": f"{gpu.major}.{gpu.minor}"}
        for gpu in properties
    ]
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if nccl else None
    found["gloo"] = "built into torch" if gloo else None
    sparse = getattr(torch.backends, "cusparselt", None)
    found["cusparselt"] = sparse.version() if sparse is not None and sparse.is_available() else None
    if listed and not visible and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        first = f"CUDA_VISIBLE_DEVICES is {chosen}: check that these GPUs exist; else " if chosen is not None else ""
        diagnosis.problems.append(
            f"GPU: nvidia-smi lists {len(listed)} (driver {listed[0]}), but torch {torch.__version__}, {built}, can use none; "
            f"{first}install a torch that the driver supports or a newer driver, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    elif torch.version.cuda is None:
        diagnosis.missing.append(f"CUDA: torch {torch.__version__} is built without it, training runs on the CPU")
    elif not visible:
        diagnosis.missing.append("GPU: none is visible, training runs on the CPU (for a container use `docker run --gpus all`)")
    elif found["cusparselt"] is None:
        diagnosis.missing.append("cuSPARSELt: torch is built without it; it would bring fast products with 2:4 weights")
    architectures = ";".join(
        re.sub(r"^\w+_(\d+)(\d[af]?)$", r"\1.\2", name) + "+PTX" * name.startswith("compute_")
        for name in torch.cuda.get_arch_list()
    )
    for gpu in found["gpus"]:
        if not serves(architectures, gpu["capability"]):
            diagnosis.problems.append(
                f"torch {torch.__version__}: built for {architectures}, which the {gpu['name']} of capability {gpu['capability']} "
                "cannot run; install a torch that is built for it"
            )
    if not visible and (slow := slow_dtype_warning(torch.bfloat16)):
        diagnosis.missing.append(f"bf16: {slow}")
    if visible and not nccl:
        diagnosis.problems.append(f"NCCL: torch {torch.__version__} is built without it, which training on GPUs needs")
    if not visible and not gloo:
        diagnosis.problems.append(f"gloo: torch {torch.__version__} is built without it, which training on the CPU needs")


def _kernels(diagnosis: Diagnosis, torch: ModuleType) -> None:
    diagnosis.found["kernels"] = None
    try:
        from maskllm.ops.extension import kernels  # importing maskllm.ops loads them

        module = kernels()
    except MaskLLMError as error:
        diagnosis.problems.append(f"kernels: {error}")
        return
    if module is None:
        diagnosis.missing.append("kernels: not built; they would bring masks several times faster than the PyTorch reference")
        return
    architectures = module.cuda_architectures if module.cuda_version is not None else None
    diagnosis.found["kernels"] = {
        "cpu": module.instruction_set(),
        "cuda": module.cuda_version,
        "architectures": architectures,
        "cusparselt": "yes" if module.has_cusparselt else None,
    }
    if not diagnosis.found["gpus"]:
        return
    if architectures is None:
        diagnosis.missing.append("CUDA kernels: not built; they would bring masks several times faster than the PyTorch reference")
        return
    for gpu in diagnosis.found["gpus"]:
        if not serves(architectures, gpu["capability"]):
            diagnosis.problems.append(
                f"kernels: built for {architectures}, which the {gpu['name']} of capability {gpu['capability']} cannot run; "
                f"build them again with TORCH_CUDA_ARCH_LIST={gpu['capability']}"
            )


def serves(architectures: str, capability: str) -> bool:
    """Whether code built for `architectures`, a list as in TORCH_CUDA_ARCH_LIST, runs on a GPU of `capability`, such as "8.6".

    Machine code runs on the same and later minor versions of its major version. PTX runs on every later version. Code for an
    architecture that ends in "a" runs on that architecture only.
    """
    major, minor = map(int, capability.split("."))
    for entry in re.split(r"[;\s]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            continue
        built = int(match[1]), int(match[2])
        if built == (major, minor):
            return True
        if match[3] != "a" and (built[0] == major and built[1] < minor):
            return True
        if not match[3] and match[4] and built < (major, minor):
            return True
    return False


def _optional_parts(diagnosis: Diagnosis) -> None:
    from maskllm.environment.optional_parts import apex, finetuning, lm_eval, transformer_engine, vllm

    for part in (transformer_engine(), apex(), lm_eval(), finetuning(), vllm()):
        diagnosis.found[part.name] = part.version
        if part.problem is not None:
            diagnosis.missing.append(str(part))


def _compilers(diagnosis: Diagnosis) -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    nvcc = str(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc") if "CUDA_HOME" in os.environ else "nvcc"
    first = (_output([compiler, "--version"]) or "").splitlines()
    release = re.search(r"release ([\d.]+)", _output([nvcc, "--version"]) or "")
    diagnosis.found["compiler"] = first[0] if first else None
    diagnosis.found["nvcc"] = release[1] if release else None


def _output(command: list[str]) -> str | None:
    """The standard output of a program; None if the program is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis as JSON values."""
    return {**dataclasses.asdict(diagnosis), "can_train": not diagnosis.problems}
