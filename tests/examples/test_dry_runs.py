"""The launch scripts' dry runs: what each would run is valid."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from maskllm.files import write_json
from maskllm.training.arguments import TrainArguments, parse_arguments
from tests.examples.scripts import EXAMPLES, RECIPES, SCRIPTS, STEPS, bash, dry_run, environment, parse_verb, split_torchrun


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
    assert download[2].startswith("meta-llama/" if recipe.startswith("llama") else "allenai/c4")
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
    assert convert.hf == (download[3] if recipe.startswith("llama") else f"/path/to/{recipe}"), "what step 1 leaves or was given"
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
    settings = {"OUTPUT": "/somewhere", "GPUS": 4, "TP": 2, "TRAIN_ITERS": 7, "TRAIN_ARGS": "--hard\n--seed 5", "SHARDS": "3 9"}
    (words,) = dry_run("llama2-7b", "5_train", tmp_path, **settings)
    torchrun, (_, *options) = split_torchrun(words)
    train = parse_arguments(options)
    assert torchrun["nproc_per_node"] == "4"
    assert (train.tensor_model_parallel_size, train.use_distributed_optimizer) == (2, True)
    assert (train.train_iters, train.hard, train.seed, train.save) == (7, True, 5, "/somewhere/learned")
    assert len(train.data_path) == 4
    (words,) = dry_run("llama2-7b", "6_resume", tmp_path, DISTRIBUTED_OPTIMIZER=1)
    assert parse_arguments(split_torchrun(words)[1][1:]).use_distributed_optimizer


@pytest.mark.parametrize("directory", ["/models/llama", "./llama", "../models/llama"])
def test_a_dry_run_shows_a_directory_of_another_machine_in_its_place(directory, tmp_path):
    downloads = dry_run("llama2-7b", "1_download", tmp_path, HF_MODEL=directory)
    assert not any(directory in words for words in downloads)
    (words,) = dry_run("llama2-7b", "3_convert", tmp_path, HF_MODEL=directory)
    assert parse_verb(words).hf == directory


@pytest.mark.parametrize("before", [False, True])
def test_a_run_that_goes_on_keeps_its_kind_of_optimizer_under_any_layout(before, tmp_path):
    info = {"details": {"settings": {"use_distributed_optimizer": before}}}
    write_json(tmp_path / "out [1]" / "learned" / "iter_0000100" / "maskllm.json", info)
    for step, layout in (("6_resume", {}), ("5_train", {"TP": 4}), ("5_train_multinode", {})):
        (words,) = dry_run("llama2-7b", step, tmp_path, OUTPUT="out [1]", SHARDS=0, **layout)
        assert parse_arguments(split_torchrun(words)[1][1:]).use_distributed_optimizer is before


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


@pytest.mark.parametrize("value", ["0", ""])
@pytest.mark.parametrize("script", ["quickstart.sh", "slurm.sbatch", "llama2-7b/1_download.sh", "llama2-7b/run_all.sh"])
def test_a_dry_run_of_0_or_nothing_is_a_run(script, value, tmp_path):
    """The programs are stand-ins that tell how they are called, and fail."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "bin").mkdir()
    for program in ("maskllm", "python", "srun"):
        (tmp_path / "bin" / program).write_text('#!/bin/bash\necho "$(basename "$0") $*" >> called\nexit 7\n')
        (tmp_path / "bin" / program).chmod(0o755)
    (tmp_path / "hf").mkdir()
    settings = {"MODEL": "hf", "TRAIN": "c4.json", "EVAL": "wiki"} if script == "quickstart.sh" else {}
    path = f"{tmp_path / 'bin'}{os.pathsep}{environment()['PATH']}"
    arguments = ["llama2-7b"] * (script == "slurm.sbatch")
    done = bash(EXAMPLES / script, tmp_path, *arguments, DRY_RUN=value, PATH=path, PYTHON="python", **settings)
    assert (done.returncode, done.stdout) == (7, "")
    called = (tmp_path / "called").read_text()
    first = {"quickstart.sh": "maskllm convert --hf hf", "slurm.sbatch": "srun --kill-on-bad-exit=1 bash"}
    assert called.startswith(first.get(script, f"python {EXAMPLES}")) and called.count("\n") == 1


@pytest.mark.parametrize("settings", [{"DRY_RUN": 0}, {"DRY_RUN": ""}])
def test_a_run_of_0_checks_and_skips_as_a_run_does(settings, tmp_path):
    done = bash(EXAMPLES / "gpt3-2b" / "3_convert.sh", tmp_path, **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert "set HF_MODEL" in done.stderr
    done = bash(EXAMPLES / "llama2-7b" / "3_convert.sh", tmp_path, HF_MODEL="/nowhere/llama", **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert "HF_MODEL=/nowhere/llama: no such directory" in done.stderr
    done = bash(EXAMPLES / "llama2-7b" / "5_train_multinode.sh", tmp_path, **settings)
    assert done.returncode != 0
    assert "HOST:PORT of one of the nodes" in done.stderr


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
    done = bash(EXAMPLES / "llama2-7b" / "3_convert.sh", tmp_path, HF_MODEL="/nowhere/llama")
    assert done.returncode == 2
    assert "HF_MODEL=/nowhere/llama: no such directory" in done.stderr
    write_json(tmp_path / "out" / "dense" / "release" / "maskllm.json", {"stage": "dense", "source": "another", "pattern": None})
    (tmp_path / "hf").mkdir()
    done = bash(EXAMPLES / "llama2-7b" / "2_preprocess.sh", tmp_path, HF_MODEL="hf", OUTPUT="out")
    assert done.returncode == 2
    assert "OUTPUT=out: what is there was made from another, not from hf; name another OUTPUT" in done.stderr
    done = bash(EXAMPLES / "llama2-7b" / "5_train.sh", tmp_path, TP="two")
    assert done.returncode == 2
    assert done.stderr == "TP=two: wanted a number, 1 or more\n"
    done = bash(EXAMPLES / "llama2-7b" / "6_resume.sh", tmp_path)
    assert done.returncode == 1
    assert "there is no run to go on with" in done.stderr


def test_a_command_runs_though_it_cannot_be_shown(tmp_path):
    script = f"set -euo pipefail; source {EXAMPLES}/common/run.sh; run touch ran; run_last touch 'ran last'"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment(), stderr=full, check=False)
    assert done.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ran", "ran last"]


def test_step_6_leaves_the_choice_of_the_checkpoint_to_the_training_where_the_latest_is_not_told(tmp_path):
    """As where latest_checkpointed_iteration.txt is damaged."""
    learned = tmp_path / "out [1]" / "learned"
    (learned / "iter_0000003").mkdir(parents=True)
    (learned / "iter_0000003" / "manifest.json").touch()
    (learned / "latest_checkpointed_iteration.txt").write_text("\0\0")
    (tmp_path / "torchrun").write_text("#!/bin/bash\necho started\n")
    (tmp_path / "torchrun").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{environment()['PATH']}"
    done = bash(EXAMPLES / "llama2-7b" / "6_resume.sh", tmp_path, OUTPUT="out [1]", PATH=path)
    assert (done.returncode, done.stdout) == (0, "started\n")
    assert "going on after" not in done.stderr
