"""Signals to step 5_train and to all steps of a recipe."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from maskllm.processes import is_gone
from tests.conftest import heed_interrupts
from tests.examples.scripts import RUN, environment, stand_ins

PREPROCESS = """#!/bin/bash
echo $1 $$ >> tasks
trap 'exit 1' TERM INT
for i in {1..1200}; do sleep 0.05; done
"""


TORCHRUN = """#!/bin/bash
[[ $* != *" prune "* ]] || exit 0
for name in TERM INT HUP; do trap "echo $name >> signals" $name; done
touch started
for i in {1..1200}; do [[ ! -e goes_on ]] || break; sleep 0.05; done
if [[ -e saves ]]; then echo 2 > out/learned/latest_checkpointed_iteration.txt; fi
exit 1
"""


@contextlib.contextmanager
def running(step: str, cwd: Path, variables: dict[str, str]) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A step of a recipe in a session of its own, and the file with its console output."""
    console = cwd / "console"
    command = ["bash", RUN, "llama2-7b", step]
    with console.open("w") as file:
        script = subprocess.Popen(command, cwd=cwd, env=variables, stderr=file, start_new_session=True, preexec_fn=heed_interrupts)
    with ended(script):
        yield script, console


@contextlib.contextmanager
def ended(script: subprocess.Popen) -> Iterator[None]:
    """Kill the processes of the script that are left at the end of the block."""
    try:
        yield
    finally:
        if script.poll() is None:
            for process in [*psutil.Process(script.pid).children(recursive=True), script]:
                process.kill()


def with_programs(folder: Path, **texts: str) -> dict[str, str]:
    """The environment in `folder` with stand-ins for programs. Makes the inputs of the steps there."""
    for path in ("hf", "data/c4/en/c4-train.00000-of-01024.json.gz", "data/c4/en/c4-train.00001-of-01024.json.gz", "held_out.txt"):
        (folder / path).mkdir(parents=True)
    settings = {"HF_MODEL": "hf", "SHARDS": "0 1", "EVAL_DATA": "held_out.txt", "OUTPUT": "out"}
    return environment(PATH=stand_ins(folder, **texts), **settings)


@pytest.fixture
def training(tmp_path) -> dict[str, str]:
    """The environment of a script with a stand-in for torchrun: it ends once `goes_on` exists, and saves first if `saves` exists."""
    (tmp_path / "out" / "learned").mkdir(parents=True)
    (tmp_path / "out" / "learned" / "latest_checkpointed_iteration.txt").write_text("1\n")
    (tmp_path / "saves").touch()
    return with_programs(tmp_path, maskllm="#!/bin/bash\n", torchrun=TORCHRUN)


def wait_for(condition: Callable[[], object], script: subprocess.Popen, console: Path | None = None) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert script.poll() is None and time.monotonic() < deadline, console and console.read_text()[-4000:]
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "received"), [(signal.SIGTERM, "TERM"), (signal.SIGINT, "INT"), (signal.SIGHUP, "TERM")])
@pytest.mark.parametrize("step", ["5_train", "all"])
def test_only_the_first_signal_reaches_the_training_and_the_script_waits_for_its_save(step, number, received, training, tmp_path):
    """torchrun quits at the third signal and leaves its processes running."""
    with running(step, tmp_path, training) as (script, console):
        wait_for((tmp_path / "started").exists, script, console)
        os.killpg(script.pid, number)  # as a terminal does
        signals = tmp_path / "signals"
        wait_for(signals.exists, script, console)
        os.killpg(script.pid, number)
        wait_for(lambda: "already stopping: waiting" in console.read_text(), script, console)
        for later in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            script.send_signal(later)
            time.sleep(0.1)
        (tmp_path / "goes_on").touch()
        assert script.wait(timeout=60) == 75
    assert signals.read_text() == f"{received}\n"
    assert console.read_text().count("already stopping") == 1


def test_a_stopped_training_that_does_not_save_has_failed(training, tmp_path):
    (tmp_path / "saves").unlink()
    with running("all", tmp_path, training) as (script, console):
        wait_for((tmp_path / "started").exists, script, console)
        script.send_signal(signal.SIGHUP)
        wait_for((tmp_path / "signals").exists, script, console)
        (tmp_path / "goes_on").touch()
        assert script.wait(timeout=60) == 1


@pytest.mark.parametrize("step", ["5_train", "all"])
@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_a_training_saves_after_its_console_was_closed(kind, step, training, tmp_path):
    """The script itself then cannot print. A pipe closes when Ctrl-C also ends the `tee` that reads it."""
    ours, its = os.openpty() if kind == "terminal" else os.pipe()

    def take_terminal() -> None:
        heed_interrupts()
        if kind == "terminal":
            fcntl.ioctl(its, termios.TIOCSCTTY, 0)

    command = ["bash", RUN, "llama2-7b", step]
    script = subprocess.Popen(
        command, cwd=tmp_path, env=training, stdout=its, stderr=its, start_new_session=True, preexec_fn=take_terminal
    )
    os.close(its)
    with ended(script):
        wait_for((tmp_path / "started").exists, script)
        os.close(ours)  # the kernel then sends SIGHUP, if this is a terminal
        if kind == "pipe":
            script.send_signal(signal.SIGINT)
        signals = tmp_path / "signals"
        wait_for(signals.exists, script)
        script.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        (tmp_path / "goes_on").touch()
        assert script.wait(timeout=60) == 75
    assert signals.read_text() == ("TERM\n" if kind == "terminal" else "INT\n")


def test_all_exits_with_75_if_it_is_stopped_while_a_step_succeeds(tmp_path):
    maskllm = """#!/bin/bash
[[ $1 == convert ]] || exit 0
trap 'exit 0' TERM
touch started
while :; do sleep 0.05; done
"""
    with running("all", tmp_path, with_programs(tmp_path, maskllm=maskllm)) as (script, console):
        wait_for((tmp_path / "started").exists, script, console)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=60) == 75
    assert "prune" not in console.read_text(), "the next step was started"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopping_all_ends_every_process(number, tmp_path):
    tasks = tmp_path / "tasks"
    with running("all", tmp_path, with_programs(tmp_path, maskllm=PREPROCESS)) as (script, console):
        wait_for(lambda: tasks.exists() and tasks.read_text().count("\n") == 2, script, console)
        if number == signal.SIGTERM:
            script.send_signal(number)  # to the script alone, as `kill` does
        else:
            os.killpg(script.pid, number)  # as a terminal does
        assert script.wait(timeout=60) != 0
    lines = [line.split() for line in tasks.read_text().splitlines()]
    assert [verb for verb, _ in lines] == ["preprocess"] * 2, "the next step was started"
    deadline = time.monotonic() + 30
    while alive := [pid for _, pid in lines if not is_gone(int(pid))]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


@pytest.mark.slow
def test_a_real_training_in_all_saves_when_it_is_stopped(pruned, tmp_path):
    output = pruned["OUTPUT"]
    settings = {"TRAIN_ITERS": 5000, "SAVE_INTERVAL": 5000, "EVAL_INTERVAL": 5000}
    with running("all", tmp_path, environment(**pruned, **settings)) as (script, console):
        wait_for(lambda: "train iteration 2 " in console.read_text(), script, console)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=120) == 75
    text = console.read_text()
    iteration = (output / "learned" / "latest_checkpointed_iteration.txt").read_text().strip()
    assert 2 <= int(iteration) < 5000
    assert text.count(f"stopped by a signal after iteration {iteration}; saved at iteration {iteration}") == 1
    assert "maskllm trim" not in text, "the next step was started"
