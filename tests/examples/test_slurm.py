"""The Slurm script, with stand-ins for Slurm's programs."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.examples.scripts import EXAMPLES, bash, environment, port_of_ours, split_torchrun

SRUN = """#!/bin/bash
printenv RDZV_ENDPOINT NNODES SRUN_CPUS_PER_TASK > rendezvous
[[ $1 == --kill-on-bad-exit=1 && -e fails ]] && exit 7
bash -c 'trap "touch asked" TERM; touch started; until [[ -e asked && -e goes_on ]]; do sleep 0.05; done; touch saved; exit 1' &
echo $! > task
trap 'kill -KILL $(cat task)' TERM  # as Slurm's own does
while kill -0 $(cat task) 2> /dev/null; do sleep 0.05; done
exit 1
"""
SCANCEL = """#!/bin/bash
[[ $1 == --signal=TERM && $2 == 42 ]] && kill -TERM $(cat task) && echo >> cancels
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
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    variables = environment(SLURM_JOB_ID=42, SLURM_CPUS_PER_TASK=64, SLURM_JOB_NUM_NODES=2, SLURM_JOB_NODELIST="node[7-8]")
    return variables | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{variables['PATH']}"}


NOTICE = re.search("^#SBATCH --signal=B:(.*)@300$", (EXAMPLES / "slurm.sbatch").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("signals", "again"),
    [
        (["notice"], True),
        (["SIGTERM"], False),  # scancel
        (["notice", "SIGTERM"], False),
        (["SIGTERM", "notice"], False),
    ],
)
def test_a_slurm_job_saves_when_it_is_stopped_and_is_queued_again_when_its_time_is_over(signals, again, cluster, tmp_path):
    job = subprocess.Popen(["bash", EXAMPLES / "slurm.sbatch", "llama2-7b"], cwd=tmp_path, env=cluster)

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

    cancels = tmp_path / "cancels"
    wait_for((tmp_path / "started").exists)
    for number, name in enumerate(signals, start=1):
        job.send_signal(
            getattr(signal, f"SIG{NOTICE[1]}" if name == "notice" else name)
        )  # to the script alone, as --signal=B: does
        wait_for(lambda number=number: cancels.exists() and cancels.read_text() == "\n" * number)
    (tmp_path / "goes_on").touch()
    assert job.wait(timeout=60) == 1
    assert (tmp_path / "saved").exists(), "the script has not waited for the processes"
    requests = tmp_path / "requests"
    assert (requests.exists() and requests.read_text()) == ("requeue 42\n" if again else False)
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
    (tmp_path / "bin" / "srun").write_text(RUNNING_SRUN)
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/bash\nprintf 'localhost\\nlocalhost\\n'\n")
    command = ["bash", EXAMPLES / "slurm.sbatch", "llama3.1-8b"]
    with port_of_ours() as port:
        variables = cluster | environment(RDZV_PORT=port, GPUS=1, **pruned) | {"PATH": cluster["PATH"]}
        job = subprocess.run(command, cwd=tmp_path, env=variables, check=False, timeout=900)
    assert job.returncode == 0, (tmp_path / "node1").read_text()[-3000:] + (tmp_path / "node2").read_text()[-3000:]
    learned = pruned["OUTPUT"] / "learned"
    assert sorted(path.name for path in (learned / "logs").iterdir()) == ["rank_00000.log", "rank_00001.log"]
    metrics = [json.loads(line) for line in (learned / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
