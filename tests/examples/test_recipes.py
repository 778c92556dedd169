"""The launch scripts: what each would run is valid, and with MODEL=tiny all of it runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from maskllm.resident import is_gone
from maskllm.training.arguments import TrainArguments, parse_arguments
from tests.conftest import heed_interrupts

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = ["llama2-7b", "llama2-13b", "llama3-8b", "llama3.1-8b", "nemotron4-15b", "gpt3-843m", "gpt3-2b"]
STEPS = ["1_download", "2_preprocess", "3_convert", "4_prune", "5_train", "6_resume", "7_trim", "8_export", "9_evaluate"]
SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), EXAMPLES / "slurm.sbatch"])


def environment(**settings: object) -> dict[str, str]:
    """This process's, with its own Python's programs first, without settings of somebody's shell, and with `settings`."""
    here = {name: os.environ[name] for name in ("HOME", "PYTHONPATH", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return here | {"PATH": path, "PYTHON": sys.executable, **{name: str(value) for name, value in settings.items()}}


def bash(script: Path, cwd: Path, *arguments: str, **settings: object) -> subprocess.CompletedProcess:
    command = ["bash", script, *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment(**settings),
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=300)
        except BaseException:
            os.killpg(
                process.pid, signal.SIGTERM
            )  # which torchrun, unlike SIGKILL, hands on to its ranks, and kills them in the end
            process.communicate(timeout=60)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def dry_run(recipe: str, step: str, cwd: Path, **settings: object) -> list[list[str]]:
    """The commands that a step would run, as words."""
    done = bash(EXAMPLES / recipe / f"{step}.sh", cwd, DRY_RUN=1, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [shlex.split(line) for line in done.stdout.splitlines()]


def parse_verb(words: list[str]) -> argparse.Namespace:
    """Read `maskllm VERB ...` as the console command does, without running it."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"maskllm.cli.{words[1]}").add_arguments(parser)
    return parser.parse_args(words[2:])


def split_torchrun(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """torchrun's options, as torchrun itself reads them, and the command of each process."""
    from torch.distributed.run import parse_args

    assert words[0] == "torchrun"
    options = parse_args(words[1:])
    assert options.module
    return vars(options), [options.training_script, *options.training_script_args]


def test_there_is_a_folder_a_recipe_with_every_step():
    found = sorted(path.parent.name for path in EXAMPLES.glob("*/recipe.sh"))
    assert found == sorted(RECIPES)
    for recipe in RECIPES:
        names = {path.stem for path in (EXAMPLES / recipe).glob("*.sh")}
        assert names == {"recipe", "run_all", "5_train_multinode", *STEPS}
        for path in (EXAMPLES / recipe).glob("[1-9r]*_*.sh"):
            assert os.access(path, os.X_OK), path


def test_the_scripts_are_clean_to_shellcheck():
    program = Path(sys.executable).with_name("shellcheck")
    if not program.exists():
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, "-x", "-P", EXAMPLES.parent, *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_an_export_of_an_older_training_makes_room_for_the_new_one(tmp_path):
    (tmp_path / "out" / "hf-2to4").mkdir(parents=True)
    remove, export = dry_run("llama2-7b", "8_export", tmp_path, OUTPUT="out")
    assert remove == ["rm", "-r", "out/hf-2to4"]
    assert export[:2] == ["maskllm", "export"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_prints_commands_that_the_programs_take(recipe, tmp_path):
    learned = f"outputs/{recipe}/learned"
    (download, *_) = downloads = dry_run(recipe, "1_download", tmp_path)
    assert all(
        words[:2] == ["hf", "download"] or words[1].endswith("download.py") or words[1:3] == ["-m", "zipfile"]
        for words in downloads
    )
    assert download[2].startswith("meta-llama/" if recipe.startswith("llama") else f"/path/to/{recipe}")
    shards = [word for words in downloads for word in words if re.fullmatch(r"en/c4-train\.000\d\d-of-01024\.json\.gz", word)]

    commands = dry_run(recipe, "2_preprocess", tmp_path)
    assert len(commands) == len(shards) == 20
    tokens = []
    for number, words in enumerate(commands):
        options = parse_verb(words)
        assert options.input == [f"data/c4/en/c4-train.{number:05d}-of-01024.json.gz"]
        assert options.append_eod
        tokens.append(f"{options.output_prefix}_text_document")

    (words,) = dry_run(recipe, "3_convert", tmp_path)
    convert = parse_verb(words)
    (words,) = dry_run(recipe, "4_prune", tmp_path)
    torchrun, words = split_torchrun(words)
    prune = parse_verb(words)
    assert torchrun["nproc_per_node"] == "8" and torchrun["standalone"]
    assert (prune.method, prune.pattern, prune.load) == ("sparsegpt", "2:4", convert.output)
    assert prune.calibration_data in tokens

    (words,) = dry_run(recipe, "5_train", tmp_path)
    torchrun, (module, *options) = split_torchrun(words)
    assert (torchrun["nproc_per_node"], torchrun["standalone"], module) == ("8", True, "maskllm.train")
    train = parse_arguments(options)
    train.check()
    assert train.data_path == [word for prefix in tokens for word in ("1", prefix)]
    assert (train.load, train.save, train.pretrained_checkpoint) == (learned, learned, prune.output)
    assert (train.tensor_model_parallel_size, train.pipeline_model_parallel_size, train.sequence_parallel) == (8, 1, True)
    assert (train.save_interval, train.keep_last, train.async_save, train.auto_fallback) == (100, 3, True, True)
    defaults = TrainArguments()  # the paper's: tests/training/test_arguments.py
    for name in (
        "pattern", "train_iters", "global_batch_size", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "weight_decay", "adam_beta1",
        "adam_beta2", "adam_eps", "clip_grad", "gumbel_temperature_range", "gumbel_scale_range", "prior_strength", "weight_reg", "hard",
    ):  # fmt: skip
        assert getattr(train, name) == getattr(defaults, name), name
    assert train.seq_length == (2048 if recipe.startswith("gpt3") else 4096)
    assert dry_run(recipe, "6_resume", tmp_path) == [["torchrun", *words[1:]]]

    (words,) = dry_run(recipe, "5_train_multinode", tmp_path)
    assert split_torchrun(words)[0]["rdzv_endpoint"] == "HOST:PORT", "what is still to be set"
    (words,) = dry_run(recipe, "5_train_multinode", tmp_path, NNODES=4, RDZV_ENDPOINT="node0:29500")
    torchrun, (_, *options) = split_torchrun(words)
    assert (torchrun["nnodes"], torchrun["rdzv_backend"], torchrun["rdzv_endpoint"]) == ("4", "c10d", "node0:29500")
    assert parse_arguments(options).use_distributed_optimizer

    (words,) = dry_run(recipe, "7_trim", tmp_path)
    trim = parse_verb(words)
    assert trim.load == learned
    (words,) = dry_run(recipe, "8_export", tmp_path)
    export = parse_verb(words)
    assert export.load == trim.output and export.mask_file.endswith(".npz")
    dense, sparse = map(parse_verb, dry_run(recipe, "9_evaluate", tmp_path))
    assert (dense.model, sparse.model) == (convert.hf, export.output)
    assert list(tmp_path.iterdir()) == [], "a dry run wrote something"


def test_settings_come_from_the_environment(tmp_path):
    settings = {"OUTPUT": "/somewhere", "GPUS": 4, "TP": 2, "TRAIN_ITERS": 7, "TRAIN_ARGS": "--hard --seed 5", "SHARDS": "3 9"}
    (words,) = dry_run("llama2-7b", "5_train", tmp_path, **settings)
    torchrun, (_, *options) = split_torchrun(words)
    train = parse_arguments(options)
    assert torchrun["nproc_per_node"] == "4"
    assert (train.tensor_model_parallel_size, train.use_distributed_optimizer) == (2, True)
    assert (train.train_iters, train.hard, train.seed, train.save) == (7, True, 5, "/somewhere/learned")
    assert len(train.data_path) == 4
    (words,) = dry_run("llama2-7b", "6_resume", tmp_path, DISTRIBUTED_OPTIMIZER=1)
    assert parse_arguments(split_torchrun(words)[1][1:]).use_distributed_optimizer


@pytest.mark.parametrize("few_bits", ["--optimizer-state-dtype 8bit", "--optimizer-state-dtype=bf16", "--mask-logits-dtype bf16"])
def test_few_bits_do_without_the_distributed_optimizer(few_bits, tmp_path):
    (words,) = dry_run("llama2-7b", "5_train", tmp_path, TP=4, TRAIN_ARGS=f"--hard {few_bits}", SHARDS=0)
    train = parse_arguments(split_torchrun(words)[1][1:])
    train.check()
    assert not train.use_distributed_optimizer


def test_the_tiny_model_sees_no_gpu():
    command = ["bash", "-c", 'source "$0" && env', EXAMPLES / "common" / "tiny.sh"]
    done = subprocess.run(
        command, env=environment(RECIPE="any", CUDA_VISIBLE_DEVICES=0), capture_output=True, text=True, check=True
    )
    assert "CUDA_VISIBLE_DEVICES=" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("script", "verbs"),
    [
        ("quickstart.sh", ["convert", "preprocess", "prune", "trim", "export", "evaluate"]),
        ("slurm.sbatch", []),
        *((f"{recipe}/run_all.sh", ["preprocess", "convert", "trim", "export", "evaluate", "evaluate"]) for recipe in RECIPES),
    ],
)
def test_a_dry_run_of_several_steps_prints_them_in_order_and_does_nothing(script, verbs, tmp_path):
    """Those of one step: test_a_dry_run_prints_commands_that_the_programs_take."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    done = bash(EXAMPLES / script, tmp_path, *["llama2-7b"] * (script == "slurm.sbatch"), DRY_RUN=1, SHARDS=0)
    assert (done.returncode, done.stderr) == (0, "")
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    ours = [words for words in commands if words[0] == "maskllm"]
    assert [words[1] for words in ours] == verbs
    for words in ours:
        parse_verb(words)
    (words,) = (words for words in commands if "maskllm.train" in words)
    parse_arguments(split_torchrun(words)[1][1:]).check()
    assert [path.name for path in tmp_path.iterdir()] == ["examples"], "a dry run wrote something"


def test_the_readme_trains_as_the_recipe_does(tmp_path):
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall("^torchrun .* -m maskllm.train .*", readme, re.MULTILINE)
    (words,) = dry_run("llama2-7b", "5_train", tmp_path)
    ours, recipes = (parse_arguments(split_torchrun(words)[1][1:]) for words in (shlex.split(command), words))
    for name in (
        "keep_last",
        "async_save",
        "save_interval",
        "tensor_model_parallel_size",
        "recompute_modules",
        "lr",
        "train_iters",
    ):
        assert getattr(ours, name) == getattr(recipes, name), name


def test_what_is_not_set_is_asked_for(tmp_path):
    done = bash(EXAMPLES / "nemotron4-15b" / "3_convert.sh", tmp_path)
    assert done.returncode == 2
    assert "set HF_MODEL" in done.stderr
    done = bash(EXAMPLES / "llama2-7b" / "5_train_multinode.sh", tmp_path)
    assert done.returncode != 0
    assert "HOST:PORT of one of the nodes" in done.stderr
    done = bash(EXAMPLES / "llama2-7b" / "3_convert.sh", tmp_path, MODEL="small")
    assert done.returncode == 2
    assert "MODEL=small: wanted tiny" in done.stderr
    done = bash(EXAMPLES / "llama2-7b" / "6_resume.sh", tmp_path)
    assert done.returncode == 1
    assert "there is no run to go on with" in done.stderr


def test_slurm_starts_the_multinode_script(tmp_path):
    settings = {"DRY_RUN": 1, "SLURM_JOB_NUM_NODES": 8, "SLURM_JOB_ID": 42}
    done = bash(EXAMPLES / "slurm.sbatch", EXAMPLES.parent, "llama2-7b", **settings)
    assert done.returncode == 0, done.stderr
    torchrun, (module, *_) = split_torchrun(shlex.split(done.stdout))
    assert (torchrun["nnodes"], torchrun["rdzv_id"], module) == ("8", "llama2-7b-42", "maskllm.train")
    header = (EXAMPLES / "slurm.sbatch").read_text()
    assert "#SBATCH --ntasks-per-node=1" in header, "torchrun starts the processes of a node itself"


SRUN = """#!/bin/bash
printenv RDZV_ENDPOINT NNODES > rendezvous
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


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """A directory with stand-ins for Slurm's programs, and the environment of a job."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    variables = environment(SLURM_JOB_ID=42, SLURM_JOB_NUM_NODES=2, SLURM_JOB_NODELIST="node[7-8]")
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
    assert (tmp_path / "rendezvous").read_text() == "node7:29500\n2\n"


def test_a_slurm_job_that_fails_is_not_queued_again(cluster, tmp_path):
    (tmp_path / "fails").touch()
    job = subprocess.run(["bash", EXAMPLES / "slurm.sbatch", "llama2-7b"], cwd=tmp_path, env=cluster, check=False, timeout=60)
    assert job.returncode == 7
    assert not (tmp_path / "requests").exists()


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


@pytest.fixture
def pruned(tiny_hf, tiny_dense, tiny_pruned, tiny_dataset, tmp_path) -> dict[str, object]:
    """The settings of a tiny run whose steps before the training are done."""
    output = tmp_path / "output"
    (output / "tokens").mkdir(parents=True)
    for suffix in (".bin", ".idx"):
        shutil.copy(tiny_dataset + suffix, output / "tokens" / f"c4_00000_text_document{suffix}")
    (output / "dense").symlink_to(tiny_dense)
    (output / "prior").symlink_to(tiny_pruned)
    return {"MODEL": "tiny", "HF_MODEL": tiny_hf, "OUTPUT": output, "SHARDS": 0}


@pytest.mark.slow
def test_the_training_of_a_run_of_all_steps_saves_when_it_is_stopped(pruned, tmp_path):
    output = pruned["OUTPUT"]
    settings = {"TRAIN_ITERS": 5000, "SAVE_INTERVAL": 5000, "EVAL_INTERVAL": 5000}
    with all_steps(tmp_path, environment(**pruned, **settings)) as (script, console):
        wait_for(lambda: "train iteration 2 " in console.read_text(), script, console)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=120) != 0
    text = console.read_text()
    iteration = (output / "learned" / "latest_checkpointed_iteration.txt").read_text().strip()
    assert 2 <= int(iteration) < 5000
    assert text.count(f"stopped by a signal after iteration {iteration}; saved at iteration {iteration}") == 1
    assert "maskllm trim" not in text, "the next step was started"


@pytest.mark.slow
def test_two_nodes_train_one_model(pruned, tmp_path):
    """Step 5, started twice as if on two machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = ["bash", EXAMPLES / "llama3.1-8b" / "5_train_multinode.sh"]
    variables = environment(RDZV_ENDPOINT=f"localhost:{port}", GPUS=1, **pruned)
    nodes = [subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        messages = [node.communicate(timeout=600)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], messages[0][-3000:] + messages[1][-3000:]
    learned = pruned["OUTPUT"] / "learned"
    assert sorted(path.name for path in (learned / "logs").iterdir()) == ["rank_00000.log", "rank_00001.log"]
    metrics = [json.loads(line) for line in (learned / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def warm_programs(ranks, tmp_path_factory) -> dict[str, str]:
    """The environment in which the programs that the scripts call run in processes that have imported everything before."""
    python = ranks.programs(tmp_path_factory.mktemp("programs"))
    return {"PATH": f"{python.parent}{os.pathsep}{environment()['PATH']}", "PYTHON": str(python)}


@pytest.mark.slow
@pytest.mark.parametrize("start", ["warm", pytest.param("cold", marks=pytest.mark.long)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tiny_model_goes_all_the_way(recipe, start, warm_programs, tmp_path):
    """The first recipe on two shards and with a checkpoint in the middle; a cold start is of the programs themselves."""
    settings = {"MODEL": "tiny"} | ({"SAVE_INTERVAL": 3} if recipe == RECIPES[0] else {"SHARDS": 0})
    if start == "warm":
        settings |= warm_programs
    done = bash(EXAMPLES / recipe / "run_all.sh", tmp_path, **settings)
    assert done.returncode == 0, done.stderr[-6000:]
    output = tmp_path / "outputs" / "tiny" / recipe
    reports = {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}
    assert reports["evaluate-dense"]["zeros"] < 0.01
    assert reports["evaluate-learned"]["zeros"] == pytest.approx(0.5, abs=1e-3)
    assert np.isfinite(reports["evaluate-learned"]["perplexity"])
    metrics = [json.loads(line) for line in (output / "learned" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]

    original, sparse = load_file(output / "hf-original" / "model.safetensors"), load_file(output / "hf-2to4" / "model.safetensors")
    with np.load(output / f"{recipe}.mask.npz", allow_pickle=False) as masks:
        pruned = {name.removesuffix(".mask") for name in masks.files}
    assert pruned and reports["trim"]["pruned_parameters"] == sum(original[name].numel() for name in pruned)
    for name, weight in original.items():
        kept = sparse[name] != 0
        assert (sparse[name] == weight)[kept | (weight == 0)].all(), name
        share = kept.float().mean().item()
        assert share == pytest.approx(0.5, abs=0.02) if name in pruned else (sparse[name] == weight).all(), name

    # Interrupted after iteration 3, as if by a failure: step 6 goes on, and ends where the run had ended.
    if recipe == RECIPES[0]:
        latest = output / "learned" / "latest_checkpointed_iteration.txt"
        before = metrics[-1]
        assert bash(EXAMPLES / recipe / "6_resume.sh", tmp_path, **settings).stderr.endswith("nothing is left to do\n")
        shutil.rmtree(output / "learned" / "iter_0000006")
        latest.write_text("3\n")
        done = bash(EXAMPLES / recipe / "6_resume.sh", tmp_path, **settings)
        assert done.returncode == 0, done.stderr[-6000:]
        assert "going on after iteration 3 of 6" in done.stderr
        again = [json.loads(line) for line in (output / "learned" / "metrics.jsonl").read_text().splitlines()]
        assert again[-1]["iteration"] == before["iteration"]
        assert again[-1]["loss_winner"] == before["loss_winner"]
