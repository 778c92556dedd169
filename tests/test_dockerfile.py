"""The Dockerfile without a container engine: it is linted, and its install steps and entry point run in a virtual environment."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent

dockerfile_parse = pytest.importorskip("dockerfile_parse")


@pytest.fixture(scope="module")
def dockerfile():
    return dockerfile_parse.DockerfileParser(fileobj=(ROOT / "Dockerfile").open("rb"))


def values(dockerfile, instruction: str) -> list[str]:
    return [entry["value"] for entry in dockerfile.structure if entry["instruction"] == instruction]


def test_hadolint_finds_nothing():
    if not (PROGRAMS / "hadolint").exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([PROGRAMS / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_base_image_architectures_and_user(dockerfile):
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", dockerfile.baseimage)
    assert dockerfile.envs["TORCH_CUDA_ARCH_LIST"].split(";") == ["8.0", "8.6", "8.9", "9.0", "10.0"]
    assert dockerfile.envs["MASKLLM_BUILD_CUDA"] == "1", "otherwise a build without CUDA kernels would succeed"
    (user,) = values(dockerfile, "USER")
    assert int(user) != 0
    order = [entry["instruction"] for entry in dockerfile.structure]
    assert "RUN" not in order[order.index("USER") :]


def test_the_build_context_holds_exactly_what_is_copied(dockerfile):
    ignored, *rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == "*"
    included = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = [source for value in values(dockerfile, "COPY") for source in value.split()[:-1]]
    assert sorted(copied) == sorted(included)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch.fnmatch(source, rule) for rule in rules if not rule.startswith("!"))


def enter(dockerfile, *command: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run the image's entry point with `command`."""
    (entrypoint,) = values(dockerfile, "ENTRYPOINT")
    return subprocess.run([*json.loads(entrypoint), *command], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(("status", "output"), [(0, "two words three\n"), (1, "")])
def test_the_entry_point_runs_the_command_only_if_doctor_succeeds(status, output, dockerfile, tmp_path):
    (tmp_path / "maskllm").write_text(f'#!/bin/sh\necho "$* says"; exit {status}\n')
    (tmp_path / "maskllm").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = enter(dockerfile, "echo", "two words", "three", environment=environment)
    assert (done.returncode, done.stdout, done.stderr) == (status, output, "doctor says\n")


def make_environment(folder: Path, *, empty: bool) -> Path:
    """A virtual environment in `folder`; returns its Python.

    `empty`: it has torch only, from the network. Otherwise it sees every package of this environment.
    """
    subprocess.run([sys.executable, "-m", "venv", *([] if empty else ["--without-pip"]), folder], check=True)
    python = folder / "bin" / "python"
    if empty:
        # Python 3.10 and 3.11 put an old setuptools into a new environment.
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "torch==2.13.0"], check=True)
    else:
        (packages_of(python) / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (folder / "bin" / "pip").write_text(f'#!/bin/sh\nexec "{python}" -m pip "$@"\n')
        (folder / "bin" / "pip").chmod(0o755)
    return python


def packages_of(python: Path) -> Path:
    """The site-packages of an interpreter."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


@pytest.mark.slow
@pytest.mark.parametrize("empty", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_install_steps_work_in_a_clean_environment(empty, dockerfile, tmp_path):
    """Runs the image's `pip install` steps and its entry point.

    With `empty`, the steps download all requirements and compile the kernels, which takes minutes. Otherwise nothing is downloaded
    or compiled, since the requirements are those of this environment.
    """
    python = make_environment(tmp_path / "venv", empty=empty)
    work = tmp_path / "work"
    work.mkdir()
    for value in values(dockerfile, "COPY"):
        *sources, target = value.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, work / target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            else:
                shutil.copy(ROOT / source, work / target)

    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= dict(dockerfile.envs) | {"MASKLLM_BUILD_CUDA": "0", "HOME": str(tmp_path)}
    if not empty:
        environment |= {"CXX": "no-compiler", "PIP_NO_INDEX": "1"}
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    steps = [value for value in values(dockerfile, "RUN") if "pip install" in value]
    assert len(steps) == 2
    for step in steps:
        done = subprocess.run(["bash", "-c", step], cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{step}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    done = enter(dockerfile, "echo", "started", environment=environment)
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr
    found = dict(re.findall(r"^(maskllm|kernels) +(.*)$", done.stderr, re.MULTILINE))
    assert found["maskllm"].endswith(f"in {packages_of(python) / 'maskllm'}")
    assert (found["kernels"] != "-") is empty
    assert ("missing       kernels: not built" in done.stderr) is not empty
    assert "training can run" in done.stderr
