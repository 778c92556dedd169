"""The Dockerfile, as far as it can be checked without a container engine: linted, its entry point run, its install steps run."""

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


def test_it_is_clean_to_hadolint():
    if not (PROGRAMS / "hadolint").exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([PROGRAMS / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_the_image_is(dockerfile):
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", dockerfile.baseimage)
    assert dockerfile.envs["TORCH_CUDA_ARCH_LIST"].split(";") == ["8.0", "8.6", "8.9", "9.0", "10.0"]
    assert dockerfile.envs["MASKLLM_BUILD_CUDA"] == "1", "without it, a build without CUDA kernels would pass"
    (user,) = values(dockerfile, "USER")
    assert int(user) != 0
    order = [entry["instruction"] for entry in dockerfile.structure]
    assert "RUN" not in order[order.index("USER") :]


def test_all_that_is_copied_reaches_the_builder(dockerfile):
    ignored, *rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == "*"
    let_through = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = [source for value in values(dockerfile, "COPY") for source in value.split()[:-1]]
    assert sorted(copied) == sorted(let_through)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch.fnmatch(source, rule) for rule in rules if not rule.startswith("!"))


def enter(dockerfile, *command: str, path: Path = PROGRAMS) -> subprocess.CompletedProcess:
    """What the container would do with `command`."""
    (entrypoint,) = values(dockerfile, "ENTRYPOINT")
    environment = os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([*json.loads(entrypoint), *command], capture_output=True, text=True, env=environment, check=False)


def test_the_entry_point_tells_what_is_there_and_runs_the_command(dockerfile):
    done = enter(dockerfile, "echo", "two words", "three")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "two words three\n"
    assert "megatron-core" in done.stderr
    assert "training can run" in done.stderr


def test_the_entry_point_stops_where_training_cannot_run(dockerfile, tmp_path):
    (tmp_path / "maskllm").write_text("#!/bin/sh\necho problem; exit 1\n")
    (tmp_path / "maskllm").chmod(0o755)
    done = enter(dockerfile, "echo", "started", path=tmp_path)
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", "problem\n")


@pytest.mark.slow
@pytest.mark.parametrize("empty", [False, pytest.param(True, marks=pytest.mark.long)])
def test_its_install_steps_work_in_a_clean_environment(empty, dockerfile, tmp_path):
    """As the image has torch, so this environment has, `empty`, torch alone, from the network, as all that the package requires.

    Else it has what is installed here, nothing is downloaded, and no kernels are compiled, which takes minutes.
    """
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # Python 3.10 and 3.11 put an old setuptools into every new environment, which would hide the one from here.
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    if empty:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "torch==2.13.0"], check=True)
    else:
        (Path(site) / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")

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

    done = subprocess.run(
        [python.parent / "maskllm", "doctor", "--json", tmp_path / "doctor.json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["found"]["maskllm"].endswith(f"in {site}/maskllm")
    assert (report["found"]["kernels"] is not None) is empty
    assert any(line.startswith("kernels: not built") for line in report["missing"]) is not empty
