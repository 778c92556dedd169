"""The Slurm script, with stand-ins for Slurm's programs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import time

import pytest

from tests.examples.scripts import EXAMPLES, bash, environment, split_torchrun

SRUN = """#!/bin/bash
printenv RDZV_ENDPOINT NNODES SRUN_CPUS_PER_TASK > rendezvous
[[ $1 == --kill-on-bad-exit=1 && -e fails ]] && exit 7
bash -c 'trap "touch saved; exit 1" TERM; touch started; while :; do sleep 0.05; done' &
echo $! > task
trap 'kill -KILL $(cat task)' TERM  # as Slurm's own does
while kill -0 $(cat task) 2> /dev/null; do sleep 0.05; done
exit 1
"""
SCANCEL = """#!/bin/bash
[[ $1 == --signal=TERM && $2 == 42 ]] && kill -TERM $(cat task)
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; else echo "$@" >> requests; fi
"""


def test_slurm_starts_the_multinode_script(tmp_path):
    settings = {"DRY_RUN": 1, "SLURM_JOB_NUM_NODES": 8, "SLURM_JOB_ID": 42}
    done = bash(EXAMPLES / "slurm.sbatch", EXAMPLES.parent, "llama2-7b", **settings)
    assert done.returncode == 0, done.stderr
    torchrun, (module, *_) = split_torchrun(shlex.split(done.stdout))
    assert (torchrun["nnodes"], torchrun["rdzv_id"], module) == ("8", "llama2-7b-42", "maskllm.train")
    header = (EXAMPLES / "slurm.sbatch").read_text()
    assert "#SBATCH --ntasks-per-node=1" in header, "torchrun starts the processes of a node itself"


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """A directory with stand-ins for Slurm's programs, and the environment of a job."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    variables = environment(SLURM_JOB_ID=42, SLURM_CPUS_PER_TASK=64, SLURM_JOB_NUM_NODES=2, SLURM_JOB_NODELIST="node[7-8]")
    return variables | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{variables['PATH']}"}


def test_a_slurm_job_that_is_asked_to_stop_saves_and_is_queued_again(cluster, tmp_path):
    job = subprocess.Popen(["bash", EXAMPLES / "slurm.sbatch", "llama2-7b"], cwd=tmp_path, env=cluster)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: does
    job.wait(timeout=60)
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requests").read_text() == "requeue 42\n"
    assert (tmp_path / "rendezvous").read_text() == "node7:29500\n2\n64\n"


def test_a_slurm_job_that_fails_is_not_queued_again(cluster, tmp_path):
    (tmp_path / "fails").touch()
    job = subprocess.run(["bash", EXAMPLES / "slurm.sbatch", "llama2-7b"], cwd=tmp_path, env=cluster, check=False, timeout=60)
    assert job.returncode == 7
    assert not (tmp_path / "requests").exists()


RUNNING_SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=1 ]] || exit 2
for node in 1 2; do "${@:2}" 2> "node$node" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit; done
"""


@pytest.mark.slow
def test_a_slurm_job_trains_one_model_on_two_nodes(cluster, pruned, tmp_path):
    """Both are this machine."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "bin" / "srun").write_text(RUNNING_SRUN)
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/bash\nprintf 'localhost\\nlocalhost\\n'\n")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variables = cluster | environment(RDZV_PORT=port, GPUS=1, **pruned) | {"PATH": cluster["PATH"]}
    job = subprocess.run(["bash", EXAMPLES / "slurm.sbatch", "llama3.1-8b"], cwd=tmp_path, env=variables, check=False, timeout=300)
    assert job.returncode == 0, (tmp_path / "node1").read_text()[-3000:] + (tmp_path / "node2").read_text()[-3000:]
    learned = pruned["OUTPUT"] / "learned"
    assert sorted(path.name for path in (learned / "logs").iterdir()) == ["rank_00000.log", "rank_00001.log"]
    metrics = [json.loads(line) for line in (learned / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
