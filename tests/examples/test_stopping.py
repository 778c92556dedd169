"""All steps of a recipe, stopped by a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from maskllm.resident import is_gone
from tests.conftest import heed_interrupts
from tests.examples.scripts import EXAMPLES, environment

PREPROCESS = """#!/bin/bash
echo $1 $$ >> tasks
trap 'exit 1' TERM INT
for i in {1..1200}; do sleep 0.05; done
"""


@contextlib.contextmanager
def all_steps(cwd: Path, variables: dict[str, str]) -> Iterator[tuple[subprocess.Popen, Path]]:
    """run_all.sh of a recipe in the foreground of a terminal of its own, with the file that has what it says."""
    console = cwd / "console"
    command = ["bash", EXAMPLES / "llama2-7b" / "run_all.sh"]
    with console.open("w") as file:
        script = subprocess.Popen(command, cwd=cwd, env=variables, stderr=file, start_new_session=True, preexec_fn=heed_interrupts)
    try:
        yield script, console
    finally:
        if script.poll() is None:
            for process in [*psutil.Process(script.pid).children(recursive=True), script]:
                process.kill()


def wait_for(condition: Callable[[], object], script: subprocess.Popen, console: Path) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert script.poll() is None and time.monotonic() < deadline, console.read_text()[-4000:]
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_of_all_steps_leaves_no_process_behind(number, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "maskllm").write_text(PREPROCESS)
    (tmp_path / "bin" / "maskllm").chmod(0o755)
    for path in ("hf", "data/c4/en/c4-train.00000-of-01024.json.gz", "data/c4/en/c4-train.00001-of-01024.json.gz", "held_out.txt"):
        (tmp_path / path).mkdir(parents=True)
    variables = environment(HF_MODEL="hf", SHARDS="0 1", EVAL_DATA="held_out.txt")
    variables["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{variables['PATH']}"
    tasks = tmp_path / "tasks"
    with all_steps(tmp_path, variables) as (script, console):
        wait_for(lambda: tasks.exists() and tasks.read_text().count("\n") == 2, script, console)
        if number == signal.SIGINT:
            os.killpg(script.pid, number)  # as a terminal does
        else:
            script.send_signal(number)  # to the script alone, as `kill` does
        assert script.wait(timeout=60) != 0
    lines = [line.split() for line in tasks.read_text().splitlines()]
    assert [verb for verb, _ in lines] == ["preprocess"] * 2, "the next step was started"
    deadline = time.monotonic() + 30
    while alive := [pid for _, pid in lines if not is_gone(int(pid))]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


@pytest.mark.slow
def test_the_training_of_a_run_of_all_steps_saves_when_it_is_stopped(pruned, tmp_path):
    output = pruned["OUTPUT"]
    settings = {"TRAIN_ITERS": 5000, "SAVE_INTERVAL": 5000, "EVAL_INTERVAL": 5000}
    with all_steps(tmp_path, environment(**pruned, **settings)) as (script, console):
        wait_for(lambda: "train iteration 2 " in console.read_text(), script, console)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=120) == 75
    text = console.read_text()
    iteration = (output / "learned" / "latest_checkpointed_iteration.txt").read_text().strip()
    assert 2 <= int(iteration) < 5000
    assert text.count(f"stopped by a signal after iteration {iteration}; saved at iteration {iteration}") == 1
    assert "maskllm trim" not in text, "the next step was started"
