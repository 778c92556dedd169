"""`maskllm doctor` lists what it finds, and fails with the reasons if training cannot run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from maskllm.cli import main
from maskllm.environment.doctor import Diagnosis, _gpus, serves
from maskllm.ops.extension import kernels


def test_the_report_of_a_complete_installation(tmp_path, capsys, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the machine may have GPUs that this torch cannot use
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["can_train"] and report["problems"] == []
    found = report["found"]
    assert found["packages"]["torch"] == metadata.version("torch") in text
    assert found["packages"]["megatron-core"] == metadata.version("megatron-core") in text
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if kernels() is not None:
        assert found["kernels"]["cpu"] == kernels().instruction_set()
    for package, name in (("transformer_engine", "transformer-engine"), ("apex", "apex")):
        if importlib.util.find_spec(package) is None:
            assert [line for line in report["missing"] if line.startswith(f"{name}: not installed; it would bring ")], name
    assert ("training can run, on the CPU (gloo)" in text) == (found["gpus"] == [])


def doctor_in_a_new_process(setup: str, folder: Path) -> tuple[subprocess.CompletedProcess, dict]:
    """Run the code `setup`, then `maskllm doctor`; returns the process and the JSON report."""
    root = str(Path(__file__).parents[2])
    start = "from maskllm.cli import main\nsys.exit(main(['doctor', '--json', 'doctor.json']))"
    command = f"import sys\nsys.path.insert(0, {root!r})\n{setup}\n{start}"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False, timeout=120, cwd=folder)
    return done, json.loads((folder / "doctor.json").read_text())


HIDE = """
import importlib.metadata
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
version = importlib.metadata.version
def hidden(name):
    if name == {distribution!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden
"""
"""Code that makes a package look as if it were not installed."""


def write_broken_package(folder: Path, name: str) -> None:
    """A package that is installed in `folder` and fails when it is imported, with two lines of message."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(
        "raise ImportError('libgone.so.1: cannot open shared object file\\nand more about it')\n"
    )


@pytest.mark.parametrize(("package", "distribution"), [("torch", "torch"), ("megatron", "megatron-core")])
def test_a_missing_requirement_is_one_problem(package, distribution, tmp_path):
    done, report = doctor_in_a_new_process(HIDE.format(package=package, distribution=distribution), tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("maskllm doctor: error: training cannot run: ")
    assert f"{distribution}: not installed, wanted {distribution}" in line
    assert "problem" in done.stdout
    assert report["can_train"] is False
    assert len(report["problems"]) == 1, "the packages that import the missing one must not be reported too"


def test_a_missing_package_and_a_broken_one_are_reported_once_each(tmp_path):
    """TensorBoard is missing: only the list of packages says so, not its importer. psutil is broken: its importer says so."""
    write_broken_package(tmp_path, "psutil")
    hide = HIDE.format(package="tensorboard", distribution="tensorboard")
    done, report = doctor_in_a_new_process(f"sys.path.insert(0, {str(tmp_path)!r})\n{hide}", tmp_path)
    missing, broken = report["problems"]
    assert missing.startswith("tensorboard: not installed, wanted tensorboard")
    assert broken == "maskllm.training.loop cannot be imported (ImportError: libgone.so.1: cannot open shared object file)"
    assert done.stderr == f"maskllm doctor: error: training cannot run: {missing}; {broken}\n"
    assert done.returncode == 1


def test_a_version_out_of_range_and_a_broken_extension_are_named(tmp_path):
    """And a broken package that the recipes need, beside them."""
    information = tmp_path / "megatron_core-0.25.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.25.0\n")
    write_broken_package(tmp_path, "tensorboard")
    extension = tmp_path / "_kernels.so"
    extension.write_bytes(b"maskllm kernels built with torch=1.0.0;")
    setup = f"""
import importlib.util, types
sys.path.insert(0, {str(tmp_path)!r})
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    types.SimpleNamespace(origin={str(extension)!r}) if name == "maskllm.ops._kernels" else find(name, *rest)
)
"""
    done, report = doctor_in_a_new_process(setup, tmp_path)
    assert done.returncode == 1
    version, tensorboard, kernels = report["problems"]
    assert version.startswith("megatron-core: 0.25.0 is installed, wanted megatron-core")
    assert tensorboard.startswith("torch.utils.tensorboard cannot be imported (ImportError: libgone.so.1: ")
    assert f"{extension}: built with torch 1.0.0, running with torch {torch.__version__}; rebuild it" in kernels


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0;8.6;8.9;9.0;10.0", "8.6", True),
        ("8.0;9.0", "8.9", True),  # machine code for 8.0 runs on every later 8.x
        ("8.6;9.0", "8.0", False),
        ("8.0;9.0", "10.0", False),
        ("8.0;9.0+PTX", "12.0", True),
        ("8.0+PTX 9.0", "10.3", True),
        ("9.0a", "9.0", True),
        ("9.0a+PTX", "10.0", False),
        ("9.0+PTX", "8.6", False),
    ],
)
def test_which_gpus_run_code_for_an_architecture(architectures, capability, runs):
    assert serves(architectures, capability) is runs


@pytest.mark.parametrize("cuda", [None, "12.8"], ids=["a CPU build", "an old driver"])
def test_gpus_that_torch_cannot_use_are_a_problem_unless_the_user_hides_them(cuda, monkeypatch):
    monkeypatch.setattr("maskllm.environment.doctor._output", lambda command: "470.1\n470.1")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _gpus(diagnosis := Diagnosis(), torch)
    (problem,) = diagnosis.problems
    assert problem.startswith("GPU: nvidia-smi lists 2 (driver 470.1), but torch ")
    assert ("built without CUDA" if cuda is None else "built for CUDA 12.8") in problem
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        _gpus(diagnosis := Diagnosis(), torch)
        assert diagnosis.problems == []


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80", "sm_90"], (7, 5), False),
        (["sm_80", "sm_90"], (10, 0), False),
        (["sm_80", "sm_90", "compute_90"], (12, 0), True),
        (["sm_90a", "sm_100"], (10, 3), True),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_a_problem(built, capability, runs, monkeypatch):
    gpu = SimpleNamespace(name="Fake", total_memory=2**30, major=capability[0], minor=capability[1])
    monkeypatch.setattr("maskllm.environment.doctor._output", lambda command: "580.1")
    for name, value in {"is_available": True, "device_count": 1, "get_arch_list": built, "get_device_properties": gpu}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *index, value=value: value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    _gpus(diagnosis := Diagnosis(), torch)
    assert [problem.endswith("install a torch that is built for it") for problem in diagnosis.problems] == [True] * (not runs)
