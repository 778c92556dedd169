"""The Slurm script with stand-ins for Slurm's programs. test_recipes.py trains with it."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.examples.scripts import EXAMPLES, bash, environment, split_torchrun, stand_ins

SCRIPT = EXAMPLES / "slurm.sbatch"
SRUN = """#!/bin/bash
printenv RDZV_ENDPOINT NNODES SRUN_CPUS_PER_TASK > rendezvous
[[ $1 == --kill-on-bad-exit=1 && -e fails ]] && exit 7
bash -c 'trap "touch asked" TERM; touch started; until [[ -e asked && -e goes_on ]]; do sleep 0.05; done; touch saved; exit 1' &
echo $! > task
trap 'kill -KILL $(cat task)' TERM  # as Slurm's own srun does
while kill -0 $(cat task) 2> /dev/null; do sleep 0.05; done
exit 1
"""
SCANCEL = """#!/bin/bash
[[ $1 == --signal=TERM && $2 == 42 ]] && kill -TERM $(cat task) && echo >> cancels
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; else echo "$@" >> requests; fi
"""

NOTICE = re.search("^#SBATCH --signal=B:(.*)@300$", SCRIPT.read_text(), re.MULTILINE)


def test_a_slurm_job_starts_one_torchrun_on_each_node(tmp_path):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    done = bash(SCRIPT, tmp_path, "llama2-7b", DRY_RUN=1, SLURM_JOB_NUM_NODES=8, SLURM_JOB_ID=42)
    assert (done.returncode, done.stderr) == (0, "")
    torchrun, (module, *_) = split_torchrun(shlex.split(done.stdout))
    assert (torchrun["nnodes"], torchrun["rdzv_id"], module) == ("8", "llama2-7b-42", "maskllm.train")
    weights = bash(SCRIPT, tmp_path, "llama2-7b", "5_train_weights", DRY_RUN=1, TRAIN_WEIGHTS="both", SLURM_JOB_NUM_NODES=8)
    torchrun, (_, *options) = split_torchrun(shlex.split(weights.stdout))
    assert (torchrun["nnodes"], options[:2]) == ("8", ["--train", "both"])
    assert "#SBATCH --ntasks-per-node=1" in SCRIPT.read_text(), "torchrun itself starts the processes of a node"
    assert [path.name for path in tmp_path.iterdir()] == ["examples"], "a dry run wrote something"


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a Slurm job in `tmp_path`, with stand-ins for Slurm's programs."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    path = stand_ins(tmp_path, srun=SRUN, scontrol=SCONTROL, scancel=SCANCEL)
    job = {"SLURM_JOB_ID": 42, "SLURM_CPUS_PER_TASK": 64, "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_NODELIST": "node[7-8]"}
    return environment(PATH=path, **job)


@pytest.mark.parametrize(
    ("signals", "again"),
    [
        (["notice"], True),
        (["SIGTERM"], False),  # scancel
        (["notice", "SIGTERM"], False),
        (["SIGTERM", "notice"], False),
    ],
)
def test_a_stopped_slurm_job_saves_and_is_queued_again_only_at_its_time_limit(signals, again, cluster, tmp_path):
    job = subprocess.Popen(["bash", SCRIPT, "llama2-7b"], cwd=tmp_path, env=cluster)

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

    cancels = tmp_path / "cancels"
    wait_for((tmp_path / "started").exists)
    for number, name in enumerate(signals, start=1):
        # The signal goes to the script alone, as with Slurm's --signal=B:.
        job.send_signal(getattr(signal, f"SIG{NOTICE[1]}" if name == "notice" else name))
        wait_for(lambda number=number: cancels.exists() and cancels.read_text() == "\n" * number)
    (tmp_path / "goes_on").touch()
    assert job.wait(timeout=60) == 1
    assert (tmp_path / "saved").exists(), "the script did not wait for the processes"
    requests = tmp_path / "requests"
    assert (requests.exists() and requests.read_text()) == ("requeue 42\n" if again else False)
    assert (tmp_path / "rendezvous").read_text() == "node7:29500\n2\n64\n"


def test_a_failed_slurm_job_is_not_queued_again(cluster, tmp_path):
    (tmp_path / "fails").touch()
    job = subprocess.run(["bash", SCRIPT, "llama2-7b"], cwd=tmp_path, env=cluster, check=False, timeout=60)
    assert job.returncode == 7
    assert not (tmp_path / "requests").exists()
