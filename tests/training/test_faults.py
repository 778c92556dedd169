"""Faults in real processes: an exception, a hung rank, a full disk, data that disappear.

Killed ranks are in test_resume.py, numbers that are not finite in test_bad_steps.py.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from maskllm.checkpoints.finding import LATEST
from tests.training.conftest import arguments, learned_tensors, steps_done

FAULTY = """
import sys
import megatron_patches
megatron_patches.import_megatron()
from maskllm import train
from maskllm.training.loop import Trainer
step = Trainer._one_step
def faulty(self):
    if self.iteration == 2:
        raise RuntimeError("a fault of the program\\nand more about it")
    return step(self)
Trainer._one_step = faulty
if __name__ == "__main__":
    sys.exit(train.main())
"""


@pytest.mark.slow
def test_a_fault_of_every_rank_is_reported_once_with_its_tracebacks_in_the_logs(start, tmp_path, tiny_dataset, tiny_pruned):
    """Under torchrun itself, which ends with a summary of its own."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    values = arguments(tmp_path / "run", tiny_dataset, tiny_pruned)
    run = start(2, values, "--max-restarts=0", program=[str(tmp_path / "faulty.py")])
    assert run.end() == 1
    rank = int(run.error.split()[3])
    assert run.error == (
        f"maskllm.train: error: rank {rank} failed in iteration 3: RuntimeError: a fault of the program; its traceback is in "
        f"logs/rank_{rank:05d}.log"
    )
    assert run.console.count("a fault of the program") == 2, "once by the job and once in torchrun's summary"
    assert 'faulty.py", line' not in run.console
    assert 'faulty.py", line 10, in faulty' in run.log(rank).read_text()

    steps = [line.split(" | ")[0] for line in run.console.splitlines() if " iteration " in line and " | " in line]
    assert steps == ["train iteration 1", "train iteration 2"]
    for number in range(2):
        text = run.log(number).read_text()
        assert text.startswith(f"--- rank {number}, process ")
        assert "train iteration" not in text


@pytest.mark.slow
def test_a_hung_rank_is_named_with_its_last_iteration(start, tmp_path, tiny_dataset, tiny_pruned):
    values = arguments(
        tmp_path / "run",
        tiny_dataset,
        tiny_pruned,
        steps=2000,
        save_interval=1000,
        distributed_timeout_minutes=0.15,
        log_interval=10,
    )
    run = start(2, values)
    run.wait_for(lambda: "train iteration 10 " in run.console)
    hung = run.rank(1)
    hung.send_signal(signal.SIGSTOP)
    run.wait_for(lambda: "no sign of life" in run.console, seconds=60)
    logged = max(int(line.split()[2]) for line in run.console.splitlines() if line.startswith("train iteration"))
    hung.send_signal(signal.SIGCONT)  # so that SIGTERM, which follows, ends it
    assert run.end() == 1
    assert "no progress for 9 s (--distributed-timeout-minutes 0.15)" in run.error
    assert f"no sign of life from rank 1 (process {hung.pid} on " in run.error
    last_heard, waits = (int(part.split()[0].strip(";")) for part in run.error.split(" in iteration ")[1:])
    assert logged - 20 <= last_heard <= waits + 1 <= logged + 12
    assert "_one_step" in run.log(0).read_text(), "the log does not say where the waiting rank was"


@pytest.mark.slow
def test_a_rank_that_waits_for_the_file_system_is_named(start, tmp_path, tiny_dataset, tiny_pruned):
    save = tmp_path / "run"
    save.mkdir()
    os.mkfifo(save / "metrics.jsonl")  # opening it waits for a writer, as with a file server that does not answer
    run = start(2, arguments(save, tiny_dataset, tiny_pruned, distributed_timeout_minutes=0.15))
    run.wait_for(lambda: run.log(0).exists() and run.log(0).read_text())
    stuck = run.rank(0)
    run.wait_for(lambda: "the others wait" in run.console)
    stuck.kill()  # SIGTERM, which follows, would not wake it
    assert run.end() == 1
    assert f"the others wait for rank 0 (process {stuck.pid} on " in run.error
    assert re.search(r" which is at (log|pathlib)\.py:\d+ ", run.error)
    assert run.error.endswith("rank 1 waits in iteration 1")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A directory that has room for one checkpoint but not for two, and a function that makes it so for a process.

    It is a small file system if this user may mount one. If not, the size of the process's files is limited so that only the second
    checkpoint's exceed it.
    """
    path = tmp_path / "disk"
    path.mkdir()
    mount = shutil.which("mount")
    if mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=5m", "tmpfs", path], capture_output=True).returncode == 0:
        try:
            yield path, lambda _: None
        finally:
            subprocess.run(["umount", path], check=True)
        return
    if resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY:
        pytest.skip("this user may neither mount a file system nor limit the size of files")
    yield path, lambda process: resource.prlimit(process, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_full_disk_during_a_save_leaves_the_checkpoint_before_it(start, whole, small_disk, tiny_dataset, tiny_pruned):
    disk, limit = small_disk
    save = disk / "run"
    shutil.copytree(whole / "iter_0000002", save / "iter_0000002")
    (save / LATEST).write_text("2\n")
    before = learned_tensors(save)
    run = start(None, arguments(save, tiny_dataset, tiny_pruned, async_save=True))
    limit(run.process.pid)
    assert run.end() == 1
    if run.error.startswith(f"maskllm.train: error: {save}/metrics.jsonl: cannot be written"):
        # The next step met the full disk before the checkpoint's writer reported it.
        assert "No space left on device" in run.error
    else:
        assert run.error.startswith(f"maskllm.train: error: {save}/iter_0000004")
        assert any(words in run.error for words in ("No space left on device", "File too large", "the disk is probably full"))
        assert run.error.endswith("older checkpoints are as they were")
    assert "Traceback" not in run.console
    assert steps_done(save) == 2
    assert not list(save.glob(".iter*")), "a half-written checkpoint still fills the disk"
    after = learned_tensors(save)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
def test_a_dataset_file_that_disappears_ends_the_run_after_a_save(start, tmp_path, tiny_dataset, tiny_pruned):
    for suffix in (".bin", ".idx"):
        shutil.copy(tiny_dataset + suffix, tmp_path / f"data{suffix}")
    save = tmp_path / "run"
    run = start(None, arguments(save, str(tmp_path / "data"), tiny_pruned, steps=2000, save_interval=1000))
    run.wait_for(lambda: "train iteration 2 " in run.console)
    (tmp_path / "data.bin").unlink()
    assert run.end() == 1
    stopped = steps_done(save)
    assert 2 <= stopped < 2000
    assert f"{tmp_path / 'data.bin'} has disappeared (No such file or directory); put it back; saved at iteration" in run.error
    assert run.error.endswith(f"saved at iteration {stopped}; run the same command to go on")
    assert json.loads((save / "metrics.jsonl").read_text().splitlines()[-1])["iteration"] == stopped
