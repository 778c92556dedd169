"""A training and all steps of a recipe, stopped by a signal."""

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
from tests.examples.scripts import EXAMPLES, environment

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


def heed_signals() -> None:
    """For `preexec_fn`: neither SIGINT nor, under nohup, SIGHUP is ignored."""
    heed_interrupts()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextlib.contextmanager
def running(name: str, cwd: Path, variables: dict[str, str]) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A script of a recipe in the foreground of a terminal of its own, with the file that has what it says."""
    console = cwd / "console"
    command = ["bash", EXAMPLES / "llama2-7b" / name]
    with console.open("w") as file:
        script = subprocess.Popen(command, cwd=cwd, env=variables, stderr=file, start_new_session=True, preexec_fn=heed_signals)
    with ended(script):
        yield script, console


@contextlib.contextmanager
def ended(script: subprocess.Popen) -> Iterator[None]:
    """A block at whose end no process of the script is left."""
    try:
        yield
    finally:
        if script.poll() is None:
            for process in [*psutil.Process(script.pid).children(recursive=True), script]:
                process.kill()


def programs(folder: Path, **texts: str) -> dict[str, str]:
    """The environment in which stand-ins for programs are found, in a directory with what comes before the steps."""
    (folder / "bin").mkdir()
    for name, text in texts.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    for path in ("hf", "data/c4/en/c4-train.00000-of-01024.json.gz", "data/c4/en/c4-train.00001-of-01024.json.gz", "held_out.txt"):
        (folder / path).mkdir(parents=True)
    variables = environment(HF_MODEL="hf", SHARDS="0 1", EVAL_DATA="held_out.txt", OUTPUT="out")
    return variables | {"PATH": f"{folder / 'bin'}{os.pathsep}{variables['PATH']}"}


@pytest.fixture
def training(tmp_path) -> dict[str, str]:
    """The environment of scripts whose training ends when it is allowed to, and is to save on the way out."""
    (tmp_path / "out" / "learned").mkdir(parents=True)
    (tmp_path / "out" / "learned" / "latest_checkpointed_iteration.txt").write_text("1\n")
    (tmp_path / "saves").touch()
    return programs(tmp_path, maskllm="#!/bin/bash\n", torchrun=TORCHRUN)


def wait_for(condition: Callable[[], object], script: subprocess.Popen, console: Path | None = None) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert script.poll() is None and time.monotonic() < deadline, console and console.read_text()[-4000:]
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "received"), [(signal.SIGTERM, "TERM"), (signal.SIGINT, "INT"), (signal.SIGHUP, "TERM")])
@pytest.mark.parametrize("name", ["5_train.sh", "run_all.sh"])
def test_a_training_gets_the_first_signal_alone_and_the_script_waits_for_its_save(name, number, received, training, tmp_path):
    """torchrun ends at the third, and leaves its processes behind."""
    with running(name, tmp_path, training) as (script, console):
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


def test_a_training_that_is_stopped_and_does_not_save_has_failed(training, tmp_path):
    (tmp_path / "saves").unlink()
    with running("run_all.sh", tmp_path, training) as (script, console):
        wait_for((tmp_path / "started").exists, script, console)
        script.send_signal(signal.SIGHUP)
        wait_for((tmp_path / "signals").exists, script, console)
        (tmp_path / "goes_on").touch()
        assert script.wait(timeout=60) == 1


@pytest.mark.parametrize("name", ["5_train.sh", "run_all.sh"])
@pytest.mark.parametrize("of", ["terminal", "pipe"])
def test_a_console_that_is_gone_does_not_keep_a_training_from_saving(of, name, training, tmp_path):
    """The script's own line has nowhere to go; a pipe is that of a `tee` which the same Ctrl-C has ended."""
    ours, its = os.openpty() if of == "terminal" else os.pipe()

    def take_terminal() -> None:
        heed_signals()
        if of == "terminal":
            fcntl.ioctl(its, termios.TIOCSCTTY, 0)

    command = ["bash", EXAMPLES / "llama2-7b" / name]
    script = subprocess.Popen(
        command, cwd=tmp_path, env=training, stdout=its, stderr=its, start_new_session=True, preexec_fn=take_terminal
    )
    os.close(its)
    with ended(script):
        wait_for((tmp_path / "started").exists, script)
        os.close(ours)  # a terminal's SIGHUP comes from the kernel
        if of == "pipe":
            script.send_signal(signal.SIGINT)
        signals = tmp_path / "signals"
        wait_for(signals.exists, script)
        script.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        (tmp_path / "goes_on").touch()
        assert script.wait(timeout=60) == 75
    assert signals.read_text() == ("TERM\n" if of == "terminal" else "INT\n")


def test_a_run_of_all_steps_that_is_stopped_as_a_step_ends_well_has_not_come_to_its_end(tmp_path):
    maskllm = """#!/bin/bash
[[ $1 == convert ]] || exit 0
trap 'exit 0' TERM
touch started
while :; do sleep 0.05; done
"""
    with running("run_all.sh", tmp_path, programs(tmp_path, maskllm=maskllm)) as (script, console):
        wait_for((tmp_path / "started").exists, script, console)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=60) == 75
    assert "prune" not in console.read_text(), "the next step was started"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_run_of_all_steps_leaves_no_process_behind(number, tmp_path):
    tasks = tmp_path / "tasks"
    with running("run_all.sh", tmp_path, programs(tmp_path, maskllm=PREPROCESS)) as (script, console):
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
def test_the_training_of_a_run_of_all_steps_saves_when_it_is_stopped(pruned, tmp_path):
    output = pruned["OUTPUT"]
    settings = {"TRAIN_ITERS": 5000, "SAVE_INTERVAL": 5000, "EVAL_INTERVAL": 5000}
    with running("run_all.sh", tmp_path, environment(**pruned, **settings)) as (script, console):
        wait_for(lambda: "train iteration 2 " in console.read_text(), script, console)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=120) == 75
    text = console.read_text()
    iteration = (output / "learned" / "latest_checkpointed_iteration.txt").read_text().strip()
    assert 2 <= int(iteration) < 5000
    assert text.count(f"stopped by a signal after iteration {iteration}; saved at iteration {iteration}") == 1
    assert "maskllm trim" not in text, "the next step was started"
