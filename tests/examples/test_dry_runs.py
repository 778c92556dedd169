"""The launch scripts without a training: usage errors, the commands that dry runs print, and wrong settings."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from maskllm.cli.train_options import parse_arguments
from maskllm.files import write_json
from maskllm.quickstart.pipeline import QuickstartSettings, masks_command, weights_command
from maskllm.training.arguments import TrainArguments
from tests.examples.scripts import (
    ALL,
    DOMAIN,
    EXAMPLES,
    RECIPES,
    RUN,
    STEPS,
    bash,
    dry_run,
    environment,
    parse_verb,
    split_torchrun,
    stand_ins,
)


def test_help_lists_all_recipes_and_steps(tmp_path):
    """Run as a program from another directory, not by `bash`."""
    done = subprocess.run([RUN, "--help"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    recipes = re.search("^RECIPE +one of (.*)$", done.stdout, re.MULTILINE)[1].split()
    steps = re.search("^STEP +one of (.*)$", done.stdout, re.MULTILINE)[1].split()
    assert sorted(recipes) == sorted([*RECIPES, DOMAIN])
    assert sorted(steps) == sorted([*STEPS, "all"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "found 0 arguments, wanted a recipe and a step"),
        (["llama2-7b"], "found 1 arguments, wanted a recipe and a step"),
        (["llama2-7b", "5_train", "6_resume"], "found 3 arguments, wanted a recipe and a step"),
        (["llama4", "5_train"], "llama4: no such recipe"),
        (["../lib/tiny", "5_train"], "../lib/tiny: no such recipe"),
        (["llama2-7b", "train"], "train: no such step"),
        (["llama2-7b", "../quickstart"], "../quickstart: no such step"),
    ],
)
def test_wrong_arguments_print_the_usage(arguments, message, tmp_path):
    done = bash(RUN, tmp_path, *arguments, DRY_RUN=1)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{RUN}: {message}\n\nusage: {RUN} RECIPE STEP\n")
    for name in (*RECIPES, *STEPS):
        assert name in done.stderr


def test_the_scripts_are_clean_to_shellcheck():
    program = Path(sys.executable).with_name("shellcheck")
    if not program.exists():
        pytest.skip("shellcheck is not installed")
    scripts = sorted([*EXAMPLES.rglob("*.sh"), EXAMPLES / "slurm.sbatch"])
    done = subprocess.run([program, "-x", "-P", EXAMPLES.parent, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_of_all_steps_prints_commands_that_the_programs_accept(recipe, tmp_path):
    """Each step reads what an earlier one writes, and the training has the paper's settings."""
    learned = f"outputs/{recipe}/learned"
    commands = dry_run(recipe, "all", tmp_path)
    first = next(number for number, words in enumerate(commands) if words[0] == "maskllm")
    downloads, preprocessing, others = commands[:first], commands[first : first + 20], commands[first + 20 :]
    assert all(
        words[:2] == ["hf", "download"] or words[1].endswith("download.py") or words[1:3] == ["-m", "zipfile"]
        for words in downloads
    )
    download = downloads[0]
    assert download[2].startswith("meta-llama/" if recipe.startswith("llama") else "allenai/c4")
    shards = [word for words in downloads for word in words if re.fullmatch(r"en/c4-train\.000\d\d-of-01024\.json\.gz", word)]
    assert len(shards) == 20

    tokens = []
    for number, words in enumerate(preprocessing):
        assert words[:2] == ["maskllm", "preprocess"]
        options = parse_verb(words)
        assert options.input == [f"data/c4/en/c4-train.{number:05d}-of-01024.json.gz"]
        assert options.append_eod
        tokens.append(f"{options.output_prefix}_text_document")

    assert [words[1] for words in others if words[0] == "maskllm"] == ["convert", "trim", "export", "evaluate", "evaluate"]
    convert_words, prune_words, train_words, *last_words = others
    convert = parse_verb(convert_words)
    assert convert.hf == (download[3] if recipe.startswith("llama") else f"/path/to/{recipe}"), "what step 1 downloads or uses"

    torchrun, words = split_torchrun(prune_words)
    prune = parse_verb(words)
    assert torchrun["nproc_per_node"] == "8" and torchrun["standalone"]
    assert (words[:2], prune.method, prune.pattern, prune.load) == (["maskllm", "prune"], "sparsegpt", "2:4", convert.output)
    assert prune.calibration_data in tokens

    torchrun, (module, *options) = split_torchrun(train_words)
    assert (torchrun["nproc_per_node"], torchrun["standalone"], module) == ("8", True, "maskllm.train")
    train = parse_arguments(options)
    train.check()
    assert train.data_path == [word for prefix in tokens for word in ("1", prefix)]
    assert (train.load, train.save, train.pretrained_checkpoint) == (learned, learned, prune.output)
    assert (train.tensor_model_parallel_size, train.pipeline_model_parallel_size, train.sequence_parallel) == (8, 1, True)
    assert (train.save_interval, train.keep_last, train.async_save, train.auto_fallback) == (100, 3, True, True)
    defaults = TrainArguments()  # tests/training/test_arguments.py compares them with the paper
    for name in (
        "pattern", "train_iters", "global_batch_size", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "weight_decay", "adam_beta1",
        "adam_beta2", "adam_eps", "clip_grad", "gumbel_temperature_range", "gumbel_scale_range", "prior_strength", "weight_reg", "hard",
    ):  # fmt: skip
        assert getattr(train, name) == getattr(defaults, name), name
    assert train.seq_length == (2048 if recipe.startswith("gpt3") else 4096)

    trim, export, dense, sparse = map(parse_verb, last_words)
    assert trim.load == learned
    assert export.load == trim.output and export.mask_file.endswith(".npz")
    assert (dense.model, sparse.model) == ([convert.hf], [export.output])
    assert list(tmp_path.iterdir()) == [], "a dry run wrote something"


@pytest.mark.parametrize("trained", ["weights", "both"])
def test_with_train_weights_the_weights_are_trained_after_the_masks(trained, tmp_path):
    """All steps but the new one start as before; the later ones use its results, under names of their own."""
    settings = {"SHARDS": 0, "TRAIN_WEIGHTS": trained, "WEIGHTS_ARGS": "--kl-temperature 2"}
    before, after = dry_run("llama2-7b", "all", tmp_path, SHARDS=0), dry_run("llama2-7b", "all", tmp_path, **settings)
    masks = next(number for number, words in enumerate(before) if "maskllm.train" in words)
    assert after[: masks + 1] == before[: masks + 1]
    weights, *others = after[masks + 1 :]
    assert dry_run("llama2-7b", "5_train_weights", tmp_path, **settings) == [weights]
    assert dry_run("llama2-7b", "6_resume", tmp_path, **settings) == [weights]
    first, second = (parse_arguments(split_torchrun(words)[1][1:]) for words in (before[masks], weights))
    second.check()
    assert (second.train, second.pretrained_checkpoint, second.teacher) == (trained, first.save, "outputs/llama2-7b/dense")
    assert second.load == second.save == "outputs/llama2-7b/weights"
    # arXiv 2509.25996: cross-entropy 2/3, divergence 1/3, 2e-5 at 7B, 256 x 4096 tokens
    assert (second.ce_loss_coeff, second.kl_loss_coeff, second.kl_temperature) == (0.67, 0.33, 2)
    assert (second.weights_lr, second.global_batch_size, second.seq_length) == (2e-5, 256, 4096)
    if trained == "both":
        assert second.gumbel_temperature_range == (first.gumbel_temperature_range[1],) * 2
        assert second.gumbel_scale_range == (first.gumbel_scale_range[1],) * 2
        assert second.lr == second.min_lr == first.min_lr
    trim, export, dense, sparse = map(parse_verb, others)
    assert (trim.load, export.load, sparse.model) == (second.save, trim.output, [export.output])
    assert export.mask_file is None and dense.model != sparse.model
    outputs = [
        {word for words in commands for word in words if word.startswith("outputs/")} for commands in (before[masks + 1 :], others)
    ]
    assert outputs[0] & outputs[1] == {"outputs/llama2-7b/evaluate-dense.json"}


def test_cast_starts_from_the_dense_model(tmp_path):
    commands = dry_run("llama2-7b", "all", tmp_path, SHARDS=0, TRAIN_WEIGHTS="cast")
    assert not any("prune" in words for words in commands)
    (words,) = (words for words in commands if words[0] == "torchrun")
    train = parse_arguments(split_torchrun(words)[1][1:])
    train.check()
    assert (train.train, train.weights_optimizer, train.pretrained_checkpoint) == ("weights", "cast", "outputs/llama2-7b/dense")
    # arXiv 2509.25996, table XI
    assert (train.weights_lr, train.l1_decay_coeff, train.train_iters, train.global_batch_size) == (2e-5, 4e-7, 7500, 256)


@pytest.mark.parametrize("trained", ["weights", "both", "cast"])
def test_the_weights_are_trained_without_a_teacher_if_nothing_needs_one(trained, tmp_path):
    for coefficient, teacher in ((0, None), ("0.0", None), ("1e-2", "outputs/llama2-7b/dense")):
        (words,) = dry_run("llama2-7b", "5_train_weights", tmp_path, SHARDS=0, TRAIN_WEIGHTS=trained, KL_LOSS_COEFF=coefficient)
        train = parse_arguments(split_torchrun(words)[1][1:])
        train.check()
        assert train.teacher == teacher


@pytest.mark.parametrize(("trained", "is_split"), [("weights", True), ("both", True), ("cast", False)])
def test_cast_keeps_the_whole_optimizer_state_on_each_rank(trained, is_split, tmp_path):
    """Megatron's distributed optimizer has no place for CAST's if Transformer Engine is installed, as in the container."""
    settings = {"SHARDS": 0, "TRAIN_WEIGHTS": trained}
    for layout in ({"TP": 4}, {"NNODES": 2}):
        (words,) = dry_run("llama2-7b", "5_train_weights", tmp_path, **settings, **layout)
        assert parse_arguments(split_torchrun(words)[1][1:]).use_distributed_optimizer is is_split
    (words,) = dry_run("llama2-7b", "5_train_weights", tmp_path, **settings, DISTRIBUTED_OPTIMIZER=1)
    assert parse_arguments(split_torchrun(words)[1][1:]).use_distributed_optimizer


def test_a_domain_starts_from_the_general_mask(tmp_path):
    general = dry_run("llama2-7b", "8_export", tmp_path)[0]
    files = {"TRAIN_FILES": "a.jsonl b.jsonl", "EVAL_DATA": "held out.txt", "OUTPUT": "out"}
    commands = dry_run(DOMAIN, "all", tmp_path, **files)
    verbs = [parse_verb(words) for words in commands if words[0] == "maskllm"]
    first, second, convert, prune, trim, export, _, sparse = verbs
    assert [first.input, second.input] == [["a.jsonl"], ["b.jsonl"]]
    assert (prune.load, prune.method, prune.pattern, prune.mask) == (
        convert.output,
        "mask-file",
        "2:4",
        parse_verb(general).mask_file,
    )
    assert (export.mask_base, trim.load, sparse.data) == (prune.mask, "out/learned", "held out.txt")
    (words,) = (words for words in commands if words[0] == "torchrun")
    train = parse_arguments(split_torchrun(words)[1][1:])
    train.check()
    assert train.pretrained_checkpoint == prune.output
    assert train.data_path == ["1", f"{first.output_prefix}_text_document", "1", f"{second.output_prefix}_text_document"]


def test_all_is_the_single_steps_in_order(tmp_path):
    steps = [words for step in ALL for words in dry_run("gpt3-2b", step, tmp_path, SHARDS="0 1")]
    assert dry_run("gpt3-2b", "all", tmp_path, SHARDS="0 1") == steps


def test_a_resumed_training_is_the_same_command(tmp_path):
    assert dry_run("llama2-7b", "6_resume", tmp_path) == dry_run("llama2-7b", "5_train", tmp_path)


def test_several_nodes_meet_at_one_endpoint(tmp_path):
    (words,) = dry_run("llama2-7b", "5_train_multinode", tmp_path)
    torchrun, _ = split_torchrun(words)
    assert (torchrun["nnodes"], torchrun["rdzv_endpoint"]) == ("2", "HOST:PORT"), "a placeholder for what is not set"
    endpoint = {"NNODES": 4, "RDZV_ENDPOINT": "node0:29500"}
    (words,) = dry_run("llama2-7b", "5_train_multinode", tmp_path, **endpoint)
    torchrun, (_, *options) = split_torchrun(words)
    assert (torchrun["nnodes"], torchrun["rdzv_backend"], torchrun["rdzv_endpoint"]) == ("4", "c10d", "node0:29500")
    assert parse_arguments(options).use_distributed_optimizer
    assert dry_run("llama2-7b", "5_train", tmp_path, **endpoint) == [words]


def test_an_export_first_removes_the_export_of_an_older_training(tmp_path):
    (tmp_path / "out" / "hf-2to4").mkdir(parents=True)
    remove, export = dry_run("llama2-7b", "8_export", tmp_path, OUTPUT="out")
    assert remove == ["rm", "-r", "out/hf-2to4"]
    assert export[:2] == ["maskllm", "export"]


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
def test_a_dry_run_accepts_a_model_directory_of_another_machine(directory, tmp_path):
    downloads = dry_run("llama2-7b", "1_download", tmp_path, HF_MODEL=directory)
    assert not any(directory in words for words in downloads)
    (words,) = dry_run("llama2-7b", "3_convert", tmp_path, HF_MODEL=directory)
    assert parse_verb(words).hf == directory


@pytest.mark.parametrize("before", [False, True])
def test_a_resumed_run_keeps_its_kind_of_optimizer_under_any_layout(before, tmp_path):
    info = {"details": {"settings": {"use_distributed_optimizer": before}}}
    write_json(tmp_path / "out [1]" / "learned" / "iter_0000100" / "maskllm.json", info)
    for step, layout in (("6_resume", {}), ("5_train", {"TP": 4}), ("5_train_multinode", {})):
        (words,) = dry_run("llama2-7b", step, tmp_path, OUTPUT="out [1]", SHARDS=0, **layout)
        assert parse_arguments(split_torchrun(words)[1][1:]).use_distributed_optimizer is before


@pytest.mark.parametrize("option", ["--optimizer-state-dtype 8bit", "--optimizer-state-dtype=bf16", "--mask-logits-dtype bf16"])
def test_low_precision_turns_the_distributed_optimizer_off(option, tmp_path):
    (words,) = dry_run("llama2-7b", "5_train", tmp_path, TP=4, TRAIN_ARGS=f"--hard {option}", SHARDS=0)
    train = parse_arguments(split_torchrun(words)[1][1:])
    train.check()
    assert not train.use_distributed_optimizer


def test_the_tiny_model_sees_no_gpu():
    command = ["bash", "-c", 'source "$0" && env', EXAMPLES / "lib" / "tiny.sh"]
    done = subprocess.run(
        command, env=environment(RECIPE="any", CUDA_VISIBLE_DEVICES=0), capture_output=True, text=True, check=True
    )
    assert "CUDA_VISIBLE_DEVICES=" in done.stdout.splitlines()


def test_a_dry_run_of_the_quickstart_prints_its_steps_and_does_nothing(tmp_path):
    done = bash(EXAMPLES / "quickstart.sh", tmp_path, DRY_RUN=1)
    assert (done.returncode, done.stderr) == (0, "")
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    verbs = [words for words in commands if words[0] == "maskllm"]
    assert [words[1] for words in verbs] == [
        "convert", "preprocess", "prune", *["trim", "export", "evaluate"] * 2, "generate",
    ]  # fmt: skip
    for words in verbs:
        parse_verb(words)
    trainings = [parse_arguments(split_torchrun(words)[1][1:]) for words in commands if words[0] != "maskllm"]
    for training in trainings:
        training.check()
    # All but the paths is the quickstart's.
    paths = ("data_path", "pretrained_checkpoint", "load", "save", "tensorboard_dir")
    settings, options = QuickstartSettings(processes=1), ("data", Path("start"), Path("save"), True)
    commands = masks_command(settings, *options), weights_command(settings, *options)
    for training, words in zip(trainings, commands, strict=True):
        ours = parse_arguments([str(word) for word in words[words.index("maskllm.train") + 1 :]])
        same = {name: getattr(ours, name) for name in paths} | {"params_dtype": ours.params_dtype}
        assert dataclasses.replace(training, **same) == ours
    assert list(tmp_path.iterdir()) == [], "a dry run wrote something"


@pytest.mark.parametrize("value", ["0", ""])
@pytest.mark.parametrize(
    ("script", "arguments", "first"),
    [
        ("quickstart.sh", [], "maskllm convert --hf hf"),
        ("slurm.sbatch", ["llama2-7b"], "srun --kill-on-bad-exit=1 bash examples/run.sh llama2-7b 5_train_multinode\n"),
        ("run.sh", ["llama2-7b", "1_download"], f"python {EXAMPLES}/steps/download.py meta-llama/Llama-2-7b-hf"),
        ("run.sh", ["llama2-7b", "all"], f"python {EXAMPLES}/steps/download.py meta-llama/Llama-2-7b-hf"),
    ],
)
def test_dry_run_set_to_0_or_nothing_runs_the_commands(script, arguments, first, value, tmp_path):
    """The programs are stand-ins: they write down how they were called, and fail."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    program = '#!/bin/bash\necho "$(basename "$0") $*" >> called\nexit 7\n'
    settings = {"MODEL": "hf", "TRAIN": "c4.json", "EVAL": "wiki"} if script == "quickstart.sh" else {}
    settings |= {"PATH": stand_ins(tmp_path, maskllm=program, python=program, srun=program), "PYTHON": "python"}
    done = bash(EXAMPLES / script, tmp_path, *arguments, DRY_RUN=value, **settings)
    assert (done.returncode, done.stdout) == (7, "")
    called = (tmp_path / "called").read_text()
    assert called.startswith(first) and called.count("\n") == 1


def test_a_model_may_have_a_hub_id_without_owner(tmp_path):
    done = bash(RUN, tmp_path, "llama2-7b", "1_download", DRY_RUN=1, HF_MODEL="gpt2")
    assert done.stdout.splitlines()[0].endswith("/steps/download.py gpt2 data/models/gpt2")


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


def test_the_page_on_trained_weights_goes_on_from_the_masks_as_the_recipe_does(tmp_path):
    page = (EXAMPLES.parent / "docs" / "training-weights.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall("^torchrun .* --train both .*", page, re.MULTILINE)
    (words,) = dry_run("llama2-7b", "5_train_weights", tmp_path, TRAIN_WEIGHTS="both")
    ours, recipes = (parse_arguments(split_torchrun(words)[1][1:]) for words in (shlex.split(command), words))
    for name in (
        "gumbel_temperature_range", "gumbel_scale_range", "weight_reg", "lr", "min_lr", "weights_lr", "weights_min_lr", "ce_loss_coeff",
        "kl_loss_coeff", "train_iters",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(recipes, name), name


@pytest.mark.parametrize("settings", [{}, {"DRY_RUN": "0"}])
@pytest.mark.parametrize(
    ("arguments", "wrong", "status", "message"),
    [
        ("nemotron4-15b 3_convert", {}, 2, "nemotron4-15b: the hub has no weights for this recipe; set HF_MODEL to"),
        ("llama2-7b 3_convert", {"HF_MODEL": "/nowhere/llama"}, 2, "HF_MODEL=/nowhere/llama: no such directory, and not a hub id"),
        ("llama2-7b 3_convert", {"MODEL": "small"}, 2, "MODEL=small: wanted tiny"),
        ("llama2-7b 5_train", {"TP": "two"}, 2, "TP=two: wanted a number, 1 or more\n"),
        ("llama2-7b 5_train", {"TRAIN_WEIGHTS": "all"}, 2, "TRAIN_WEIGHTS=all: wanted weights, both, cast or nothing\n"),
        ("llama2-7b 5_train_weights", {}, 2, "TRAIN_WEIGHTS is not set: wanted weights, both or cast, also for the steps after"),
        (
            "llama2-7b 5_train_weights",
            {"TRAIN_WEIGHTS": "weights"},
            1,
            f"outputs/llama2-7b/learned: found no masks whose weights could be trained; learn them first, with: {RUN} llama2-7b 5_train\n",
        ),
        (
            "llama2-7b 6_resume",
            {"TRAIN_WEIGHTS": "both"},
            1,
            "outputs/llama2-7b/weights: found no checkpoint to resume from; start a training with: "
            f"{RUN} llama2-7b 5_train_weights\n",
        ),
        (f"{DOMAIN} 3_convert", {}, 2, f"{DOMAIN}: TRAIN_FILES is not set: wanted text of the domain; "),
        (f"{DOMAIN} 3_convert", {"TRAIN_FILES": "a"}, 2, f"{DOMAIN}: EVAL_DATA is not set: wanted text of the domain; "),
        ("llama2-7b 5_train_multinode", {}, 1, "RDZV_ENDPOINT is not set: with NNODES=2, wanted HOST:PORT of one of the nodes"),
        (
            "llama2-7b 6_resume",
            {},
            1,
            f"outputs/llama2-7b/learned: found no checkpoint to resume from; start a training with: {RUN} llama2-7b 5_train\n",
        ),
        (
            "llama2-7b 2_preprocess",
            {"HF_MODEL": "hf", "OUTPUT": "out"},
            2,
            "OUTPUT=out: its contents were made from another, not from hf; set OUTPUT to another directory\n",
        ),
    ],
)
def test_wrong_settings_are_named(arguments, wrong, status, message, settings, tmp_path):
    write_json(tmp_path / "out" / "dense" / "release" / "maskllm.json", {"stage": "dense", "source": "another", "pattern": None})
    (tmp_path / "hf").mkdir()
    done = bash(RUN, tmp_path, *arguments.split(), **wrong, **settings)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("shards", "jobs"), [("7", 1), ("0 3 5", 2)])
def test_preprocessing_tokenizes_each_shard_once_and_fails_if_one_fails(shards, jobs, tmp_path):
    (tmp_path / "hf").mkdir()
    program = '#!/bin/bash\necho "$*" >> called\n[[ $* != *c4-train.00005* ]]\n'
    settings = {"HF_MODEL": "hf", "OUTPUT": "out", "SHARDS": shards, "JOBS": jobs, "PATH": stand_ins(tmp_path, maskllm=program)}
    done = bash(RUN, tmp_path, "llama2-7b", "2_preprocess", **settings)
    assert (done.returncode == 0) is ("5" not in shards.split())
    called = (tmp_path / "called").read_text().splitlines()
    options = [parse_verb(["maskllm", *line.split()]) for line in called]
    inputs = sorted(option.input for option in options)
    assert inputs == [[f"data/c4/en/c4-train.0000{shard}-of-01024.json.gz"] for shard in shards.split()]
    assert sorted(option.output_prefix for option in options) == [f"out/tokens/c4_0000{shard}" for shard in shards.split()]


def test_preprocessing_takes_the_files_of_a_domain(tmp_path):
    (tmp_path / "hf").mkdir()
    path = stand_ins(tmp_path, maskllm='#!/bin/bash\necho "$*" >> called\n')
    settings = {"HF_MODEL": "hf", "OUTPUT": "out", "TRAIN_FILES": "a b", "EVAL_DATA": "c", "JOBS": 2, "PATH": path}
    assert bash(RUN, tmp_path, DOMAIN, "2_preprocess", **settings).returncode == 0
    options = [parse_verb(["maskllm", *line.split()]) for line in (tmp_path / "called").read_text().splitlines()]
    assert sorted((option.input, option.output_prefix) for option in options) == [
        (["a"], "out/tokens/text_00000"),
        (["b"], "out/tokens/text_00001"),
    ]


def test_a_command_runs_even_if_it_cannot_be_printed(tmp_path):
    script = f"set -euo pipefail; source {EXAMPLES}/lib/commands.sh; run touch ran; run_last touch 'ran last'"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment(), stderr=full, check=False)
    assert done.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ran", "ran last"]


def test_6_resume_starts_the_training_if_the_file_that_names_the_latest_checkpoint_is_damaged(tmp_path):
    """The training itself then chooses the checkpoint."""
    learned = tmp_path / "out [1]" / "learned"
    (learned / "iter_0000003").mkdir(parents=True)
    (learned / "iter_0000003" / "manifest.json").touch()
    (learned / "latest_checkpointed_iteration.txt").write_text("\0\0")
    path = stand_ins(tmp_path, torchrun="#!/bin/bash\necho started\n")
    done = bash(RUN, tmp_path, "llama2-7b", "6_resume", OUTPUT="out [1]", PATH=path)
    assert (done.returncode, done.stdout) == (0, "started\n")
    assert "resuming after" not in done.stderr
