"""What the tests of resuming and of faults share: a short run, its uninterrupted end, and ways to start, watch and kill one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from maskllm.checkpoints.reading import resolve

STEPS = 6


def arguments(save: Path, dataset: str, start: Path, steps: int = STEPS, **options: object) -> list[str]:
    """The command line of a run of `steps` steps that saves every other one; `options` add to it and override it (True: a switch)."""
    values = {
        "data_path": dataset, "pretrained_checkpoint": start, "save": save, "load": save, "train_iters": steps,
        "global_batch_size": 4, "seq_length": 32, "lr": 0.01, "params_dtype": "fp32", "log_interval": 1, "eval_iters": 0,
        "save_interval": 2, **options,
    }  # fmt: skip
    words = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    return words


class Run:
    """A run in the background, its console in a file."""

    def __init__(self, log: Path, processes: int | None, values: list[str], *launcher: str, **popen: object) -> None:
        """`processes` ranks under torchrun with the options `launcher`, or, if None, one process without it."""
        if processes is None:
            command = [sys.executable, "-m", "maskllm.train"]
        else:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command = [*torchrun, *launcher, "-m", "maskllm.train"]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, *values], stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}, **popen
            )

    @property
    def console(self) -> str:
        """What it has printed."""
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object], seconds: float = 200) -> None:
        """Poll until `condition` holds; fail if the run ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.console[-4000:]
            assert time.monotonic() < deadline, self.console[-4000:]
            time.sleep(0.005)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if "maskllm.train" in child.cmdline() and child.environ().get("RANK") == str(number):
                    return child
        raise AssertionError(f"no rank {number}")

    def kill_all(self) -> None:
        """SIGKILL to torchrun and every rank; torchrun puts each rank in a session of its own."""
        launcher = psutil.Process(self.process.pid)
        launcher.suspend()  # or it may start one more while it is killed
        for one in [*launcher.children(recursive=True), launcher]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()

    def end(self, seconds: float = 200) -> int:
        """Wait for the end; returns the exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.console[-4000:]) from None


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs; what is left of them at the end of the test is killed."""
    runs: list[Run] = []

    def begin(processes: int | None, values: list[str], *launcher: str, **popen: object) -> Run:
        runs.append(Run(tmp_path / f"console{len(runs)}", processes, values, *launcher, **popen))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.kill_all()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, ranks: Callable, tiny_dataset: str, tiny_pruned: Path) -> Path:
    """The checkpoints of a run on two data-parallel ranks that nothing interrupted, one every second step."""
    save = tmp_path_factory.mktemp("whole") / "run"
    ranks(2, "maskllm.train", *arguments(save, tiny_dataset, tiny_pruned))
    return save


def learned_tensors(save: Path) -> dict[str, torch.Tensor]:
    """Logits and everything of the optimizer."""
    tensors = resolve(save).tensors
    return {key: tensors[key].load() for key in tensors if "mask_logits" in key or key.startswith("optimizer")}


def assert_bit_identical(one: Path, other: Path) -> None:
    """The two checkpoints hold the same logits and optimizer states."""
    expected, found = learned_tensors(one), learned_tensors(other)
    assert expected.keys() == found.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq") for key in expected), sorted(expected)
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
