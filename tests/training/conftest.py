"""What the tests of training share: a short run, the same run uninterrupted, and ways to start, watch, kill and compare runs."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from maskllm.checkpoints.finding import LATEST
from maskllm.checkpoints.reading import resolve
from maskllm.errors import flag
from tests.ranks import Job, Pool

STEPS = 6


def arguments(save: Path, dataset: str, start: Path, steps: int = STEPS, **options: object) -> list[str]:
    """The command line of a run of `steps` steps that saves every other one.

    `options` add to it and override it: True for a switch, a list for several values.
    """
    values = {
        "data_path": dataset, "pretrained_checkpoint": start, "save": save, "load": save, "train_iters": steps,
        "global_batch_size": 4, "seq_length": 32, "params_dtype": "fp32", "log_interval": 1, "eval_iters": 0, "save_interval": 2,
        **({} if options.get("train") == "weights" else {"lr": 0.01}), **options,
    }  # fmt: skip
    words = []
    for name, value in values.items():
        words.append(flag(name))
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


class Run:
    """A run in the background with its console in a file."""

    def __init__(self, console: Path, save: Path, process: Job) -> None:
        self._console = console
        self.save = save
        self.process = process

    @property
    def console(self) -> str:
        """What it has printed."""
        return self._console.read_text()

    @property
    def error(self) -> str:
        """The one line that says why it failed."""
        (line,) = [line for line in self.console.splitlines() if line.startswith("maskllm.train: error:")]
        return line

    def wait_for(self, condition: Callable[[], object], seconds: float = 200) -> None:
        """Poll until `condition` holds; fail if the run ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.console[-4000:]
            assert time.monotonic() < deadline, self.console[-4000:]
            time.sleep(0.005)

    def log(self, rank: int) -> Path:
        """The file with what a rank prints, except for the progress and the run's failure."""
        return self.save / "logs" / f"rank_{rank:05d}.log"

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank, from the last line of its log that names one."""
        (*_, line) = [line for line in self.log(number).read_text().splitlines() if line.startswith(f"--- rank {number}, process ")]
        return psutil.Process(int(line.split()[4]))

    def kill_all(self) -> None:
        """SIGKILL to all ranks at once, and to what started them."""
        self.process.kill()

    def end(self, seconds: float = 200) -> int:
        """Wait for the end; returns the exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.console[-4000:]) from None


@pytest.fixture
def start(tmp_path: Path, ranks: Pool) -> Iterator[Callable[..., Run]]:
    """Starts runs in the background and kills those that still run at the end of the test.

    `start(2, VALUES)` starts two ranks as torchrun does, `start(None, VALUES)` one process without it, and `start(2, VALUES, OPTION...)`
    the real torchrun with these options. `program` is another program than maskllm.train.
    """
    runs: list[Run] = []

    def begin(processes: int | None, values: list[str], *torchrun: str, program: Sequence[str] = ("-m", "maskllm.train")) -> Run:
        words, environment = [*program, *values], {}
        if torchrun:
            words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *torchrun, *words]
            processes, environment = None, {"PYTHON_EXEC": str(ranks.programs(tmp_path))}
        console = tmp_path / f"console{len(runs)}"
        with console.open("w") as file:
            process = ranks.start(processes, words, [file.fileno()] * 2, **environment)
        runs.append(Run(console, Path(values[values.index("--save") + 1]), process))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill_all()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, ranks: Callable, tiny_dataset: str, tiny_pruned: Path) -> Path:
    """The checkpoints, one every second step, of an uninterrupted run on two data-parallel ranks."""
    save = tmp_path_factory.mktemp("whole") / "run"
    ranks(2, "maskllm.train", *arguments(save, tiny_dataset, tiny_pruned))
    return save


def steps_done(save: Path) -> int:
    """The iteration in the pointer file to the latest checkpoint; 0 without the file."""
    return int((save / LATEST).read_text()) if (save / LATEST).is_file() else 0


def metrics(save: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors in the latest checkpoint, the optimizer's too."""
    checkpoint = resolve(path)
    return {name: checkpoint.tensors[name].load() for name in checkpoint.tensors}


def assert_resumes_with_the_same_bits(ranks: Pool, folder: Path, words: Sequence[str]) -> dict[str, torch.Tensor]:
    """`words` are a run of six steps on two ranks that saves every third step to folder/run.

    SIGKILL ends it after the fourth step. Resumed, it has the last checkpoint and the log of a run that nothing interrupted, whose
    tensors are returned.
    """
    save = folder / "run"
    ranks(2, "maskllm.train", *words)
    whole, log = tensors(save), metrics(save)
    save.rename(folder / "whole")
    killed = ranks(2, "tests.training.killed_worker", STEPS - 2, *words, check=False)
    assert killed.returncode != 0
    assert (steps_done(save), len(metrics(save))) == (STEPS - 3, STEPS - 2), killed.stderr
    done = ranks(2, "maskllm.train", *words)
    assert f"after iteration {STEPS - 3} of {STEPS}" in done.stderr
    again = tensors(save)
    assert whole.keys() == again.keys()
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, again[name])] == []
    for first, second in zip(log, metrics(save), strict=True):
        for key in ("iteration", "loss", "kl", "grad_norm"):
            assert second[key] == first[key], (first["iteration"], key)
    return whole


def assert_moves_to_another_layout(
    ranks: Pool, folder: Path, words: Callable[..., list[str]], before: dict[str, object], after: dict[str, object]
) -> dict[str, torch.Tensor]:
    """A finished run under the layout `before` is loaded under the layout `after` and saved again: each tensor has the same bits.

    `words(save, **options)` is the command line of the run, on two ranks. Returns the tensors.
    """
    ranks(2, "maskllm.train", *words(folder / "run", **before))
    done = ranks(2, "maskllm.train", *words(folder / "copy", load=folder / "run", **after))
    assert "resuming" in done.stderr, done.stderr
    whole, copy = tensors(folder / "run"), tensors(folder / "copy")
    assert whole.keys() == copy.keys()
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, copy[name])] == []
    return whole


def logits(save: Path) -> dict[str, torch.Tensor]:
    """The logits in the latest checkpoint."""
    return {key: tensor for key, tensor in learned_tensors(save).items() if not key.startswith("optimizer")}


def learned_tensors(save: Path) -> dict[str, torch.Tensor]:
    """The logits and the optimizer's tensors in the latest checkpoint, or in the checkpoint `save` itself."""
    tensors = resolve(save).tensors
    return {key: tensors[key].load() for key in tensors if "mask_logits" in key or key.startswith("optimizer")}


def assert_bit_identical(one: Path, other: Path) -> None:
    """The two checkpoints hold the same logits and optimizer states."""
    expected, found = learned_tensors(one), learned_tensors(other)
    assert expected.keys() == found.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq") for key in expected), sorted(expected)
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key


def assert_close(one: Path, other: Path) -> None:
    """The two checkpoints hold the same logits and optimizer states to rounding.

    An entry with a gradient of nearly zero may go either way; all others agree.
    """
    expected, found = learned_tensors(one), learned_tensors(other)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        close = torch.isclose(tensor.double(), found[key].double(), rtol=1e-3, atol=1e-4)
        assert close.double().mean() > 0.999, key
