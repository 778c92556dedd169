"""A run that is killed and started again ends where the uninterrupted run ends, bit for bit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from maskllm.models.checkpoint import LATEST, resolve
from tests.conftest import torchrun


def arguments(save: Path, dataset: str, start: Path, steps: int = 6) -> list[str]:
    values = [
        "--data-path", dataset, "--pretrained-checkpoint", start, "--save", save, "--load", save, "--train-iters", steps,
        "--global-batch-size", 4, "--seq-length", 32, "--lr", 0.01, "--params-dtype", "fp32", "--log-interval", 1,
        "--eval-iters", 0, "--save-interval", 3,
    ]  # fmt: skip
    return list(map(str, values))


def start_training(log: Path, processes: int, *values: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "maskllm.train",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen([*command, *values], stdout=file, stderr=file, env=environment)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to torchrun and every rank; torchrun puts each rank in a session of its own."""
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def wait_for_iteration(save: Path, iteration: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not (save / LATEST).is_file() or int((save / LATEST).read_text()) < iteration:
        assert process.poll() is None, (save.parent / "log").read_text()[-4000:]
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)


def learned_tensors(save: Path) -> dict[str, torch.Tensor]:
    """Logits and everything of the optimizer."""
    tensors = resolve(save).tensors
    return {key: tensors[key].load() for key in tensors if "mask_logits" in key or key.startswith("optimizer")}


@pytest.mark.slow
def test_killed_run_ends_as_the_uninterrupted_one(tmp_path, tiny_dataset, tiny_pruned):
    torchrun(2, "maskllm.train", *arguments(tmp_path / "whole", tiny_dataset, tiny_pruned))
    killed = arguments(tmp_path / "killed", tiny_dataset, tiny_pruned)
    process = start_training(tmp_path / "log", 2, *killed)
    wait_for_iteration(tmp_path / "killed", 3, process)
    kill_all(process)
    torchrun(2, "maskllm.train", *killed)

    whole, resumed = learned_tensors(tmp_path / "whole"), learned_tensors(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq") for key in whole), sorted(whole)
    for key, tensor in whole.items():
        assert torch.equal(tensor, resumed[key]), key


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(tmp_path, tiny_dataset, tiny_pruned):
    values = arguments(tmp_path / "run", tiny_dataset, tiny_pruned, steps=2000)
    process = start_training(tmp_path / "log", 1, *values)
    wait_for_iteration(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    stopped = int((tmp_path / "run" / LATEST).read_text())
    assert stopped < 2000
    process = start_training(tmp_path / "log", 1, *values)
    wait_for_iteration(tmp_path / "run", stopped + 3, process)
    kill_all(process)


@pytest.mark.slow
def test_a_contradicting_setting_is_refused(tmp_path, tiny_dataset, tiny_pruned):
    values = arguments(tmp_path / "run", tiny_dataset, tiny_pruned, steps=3)
    torchrun(1, "maskllm.train", *values)
    done = torchrun(1, "maskllm.train", *values, "--seed", 7, check=False)
    assert done.returncode != 0
    assert "--seed 7: the run in" in done.stderr
    assert "has 1234" in done.stderr
