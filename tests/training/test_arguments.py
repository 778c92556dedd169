"""An option of training that cannot work is refused in one line that names it, before a process group exists."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from maskllm.checkpoints.checksums import write_manifest
from maskllm.cli.train_options import parse_arguments
from maskllm.errors import MaskLLMError
from maskllm.megatron.build import check_recomputation
from maskllm.training.arguments import TrainArguments
from maskllm.training.data import build_batches
from maskllm.training.start import SETTINGS_THAT_MUST_MATCH, data_identity, resolve_start

GOOD = TrainArguments(data_path=["data"], load="checkpoint")


def test_the_defaults_are_the_papers_recipe():
    arguments = parse_arguments(["--data-path", "data", "--load", "checkpoint"])
    assert arguments.check().num_candidates == 6
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_eps) == (0.9, 0.95, 1e-5)
    assert (arguments.lr, arguments.min_lr, arguments.weight_decay, arguments.clip_grad) == (5e-5, 5e-6, 0.1, 1.0)
    assert (arguments.global_batch_size, arguments.seq_length, arguments.train_iters) == (256, 4096, 2000)
    assert arguments.gumbel_temperature_range == (4.0, 0.05)
    assert arguments.gumbel_scale_range == (1e2, 5e2)
    assert (arguments.prior_strength, arguments.weight_reg, arguments.hard) == (3.0, 1e-5, False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data_path", [], "--data-path"),
        ("load", None, "--load"),
        ("pattern", "2of4", "pattern '2of4': wanted N:M"),
        ("pattern", "4:2", "pattern 4:2"),
        ("pattern", "8:16", "12870 candidate masks"),
        ("train_iters", 0, "--train-iters: found 0, wanted at least 1"),
        ("micro_batch_size", -1, "--micro-batch-size: found -1"),
        ("global_batch_size", 0, "--global-batch-size: found 0"),
        ("seq_length", 0, "--seq-length: found 0"),
        ("log_interval", 0, "--log-interval"),
        ("eval_interval", 0, "--eval-interval"),
        ("eval_iters", -1, "--eval-iters: found -1, wanted at least 0"),
        ("save_interval", 5, "--save-interval: wanted a positive number of steps, and --save"),
        ("tensor_model_parallel_size", 0, "--tensor-model-parallel-size: found 0"),
        ("pipeline_model_parallel_size", -2, "--pipeline-model-parallel-size: found -2"),
        ("distributed_timeout_minutes", 0, "--distributed-timeout-minutes: found 0, wanted a positive number"),
        ("max_bad_steps", 0, "--max-bad-steps: found 0"),
        ("keep_last", 0, "--keep-last: found 0, wanted at least 1"),
        ("gumbel_temperature_range", (0.0, 1.0), "--gumbel-temperature-range: found 0.0 1.0, wanted positive"),
        ("gumbel_temperature_range", (4.0, math.nan), "--gumbel-temperature-range: found 4.0 nan"),
        ("gumbel_scale_range", (1.0, math.inf), "--gumbel-scale-range: found 1.0 inf"),
        ("prior_strength", -1.0, "--prior-strength: found -1.0"),
        ("weight_reg", math.nan, "--weight-reg: found nan"),
        ("lr", 0.0, "--lr: found 0.0, wanted a positive number"),
        ("lr", math.nan, "--lr: found nan"),
        ("min_lr", -1.0, "--min-lr: found -1.0"),
        ("min_lr", 1.0, "--min-lr 1.0: wanted at most --lr"),
        ("lr_warmup_iters", -1, "--lr-warmup-iters: found -1"),
        ("lr_warmup_iters", 2000, "--lr-warmup-iters 2000: wanted fewer than --train-iters 2000"),
        ("weight_decay", -0.1, "--weight-decay"),
        ("adam_beta1", 1.0, "--adam-beta1: found 1.0, wanted at least 0 and less than 1"),
        ("adam_beta2", -0.1, "--adam-beta2"),
        ("adam_eps", -1.0, "--adam-eps"),
        ("clip_grad", -1.0, "--clip-grad"),
        ("seed", -1, "--seed"),
        ("seed", 1 << 32, r"--seed: found 4294967296, wanted at least 0 and less than 2\^32"),
        ("recompute_granularity", "full", "--recompute-granularity full: wanted --recompute-method and --recompute-num-layers too"),
        ("recompute_method", "uniform", "--recompute-method: wanted only with --recompute-granularity full"),
        ("recompute_num_layers", 1, "--recompute-num-layers: wanted only with --recompute-granularity full"),
        ("recompute_modules", ["mlp"], "--recompute-modules: wanted only with --recompute-granularity selective"),
        ("split", "most,some", "--split most,some"),
        ("split", "-1,2,3", "--split -1,2,3"),
        ("split", "1,2,3,4", "--split 1,2,3,4"),
        ("split", "0,0,0", "--split 0,0,0"),
        ("split", "nan,1,1", "--split nan,1,1"),
    ],
)
def test_an_option_that_cannot_work_is_named(name, value, message):
    GOOD.check()
    with pytest.raises(MaskLLMError, match=message) as caught:
        dataclasses.replace(GOOD, **{name: value}).check()
    assert "\n" not in str(caught.value)


WEIGHTS = {"train": "weights"}
CAST = {"train": "weights", "weights_optimizer": "cast"}


@pytest.mark.parametrize(
    ("run", "name", "value", "message"),
    [
        *(
            (run, name, value, f"--{name.replace('_', '-')}: wanted only with --train masks or --train both")
            for name, value in {
                "lr": 1e-4, "min_lr": 0.0, "weight_decay": 0.0, "gumbel_temperature_range": (1.0, 0.05), "gumbel_scale_range": (1e3, 1e3),
                "prior_strength": 5.0, "weight_reg": 0.0, "mask_sample_interval": "step", "hard": True,
            }.items()
            for run in (WEIGHTS, CAST)
        ),
        (WEIGHTS, "lr", 1e-4, "; --weights-lr is the weights'"),
        (WEIGHTS, "weight_decay", 0.0, "; --weights-weight-decay is the weights'"),
        *(
            ({}, name, value, f"--{name.replace('_', '-')}: wanted only with --train weights or --train both")
            for name, value in {
                "weights_lr": 1e-4, "weights_min_lr": 1e-6, "weights_weight_decay": 0.1, "train_embeddings": True
            }.items()
        ),
        *((run, "weights_start_iter", 5, "--weights-start-iter: wanted only with --train both") for run in ({}, WEIGHTS, CAST)),
        *(({"train": run}, "mask_refresh_interval", 5, "only with --weights-optimizer cast") for run in ("masks", "weights", "both")),
        *((run, "kl_temperature", 2.0, "--kl-temperature: wanted only with --kl-loss-coeff above 0") for run in ({}, WEIGHTS)),
        ({"squarehead_loss_coeff": 1.0}, "kl_temperature", 2.0, "--kl-temperature: wanted only with --kl-loss-coeff above 0"),
        ({}, "teacher", "dense", "--teacher: wanted only with --kl-loss-coeff or --squarehead-loss-coeff above 0"),
    ],
)  # fmt: skip
def test_a_setting_that_decides_nothing_in_the_run_is_refused(run, name, value, message):
    arguments = dataclasses.replace(GOOD, **run, adam_eps=None)
    arguments.check()
    with pytest.raises(MaskLLMError, match=message) as caught:
        dataclasses.replace(arguments, **{name: value}).check()
    assert "\n" not in str(caught.value)


def test_cast_has_the_loss_of_its_paper():
    arguments = TrainArguments(**CAST)
    assert (arguments.ce_loss_coeff, arguments.kl_loss_coeff, arguments.adam_eps) == (2 / 3, 1 / 3, 1e-8)
    assert TrainArguments(**CAST, kl_loss_coeff=0.0, ce_loss_coeff=1.0).distills is False
    assert (TrainArguments().ce_loss_coeff, TrainArguments().kl_loss_coeff) == (1.0, 0.0)


def test_settings_that_decide_something_are_accepted():
    of_masks = {"lr": 1e-4, "min_lr": 0.0, "prior_strength": 5.0, "weight_reg": 0.0, "hard": True}
    of_weights = {"weights_lr": 1e-4, "weights_min_lr": 1e-6, "weights_weight_decay": 0.1, "train_embeddings": True}
    for settings in (
        of_masks,
        WEIGHTS | of_weights,
        CAST | of_weights | {"mask_refresh_interval": 5},
        {"train": "both", "weights_start_iter": 5, "kl_loss_coeff": 0.5, "kl_temperature": 2.0, **of_masks, **of_weights},
        {"squarehead_loss_coeff": 0.5, "teacher": "dense"},
    ):
        dataclasses.replace(GOOD, adam_eps=None, **settings).check()


def test_sequence_parallelism_needs_sequences_that_split_evenly():
    arguments = dataclasses.replace(GOOD, sequence_parallel=True, seq_length=30, tensor_model_parallel_size=4)
    with pytest.raises(MaskLLMError, match="--seq-length 30: with --sequence-parallel wanted a multiple"):
        arguments.check()
    dataclasses.replace(arguments, seq_length=32).check()


@pytest.mark.parametrize("name", ["mask_logits_dtype", "optimizer_state_dtype"])
def test_low_precision_with_the_distributed_optimizer_is_refused(name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(MaskLLMError, match=f"{flag} bf16: Megatron's distributed optimizer keeps fp32; leave out"):
        dataclasses.replace(GOOD, use_distributed_optimizer=True, **{name: "bf16"}).check()


def test_groups_of_recomputed_layers_must_fit_the_pipeline_stage():
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
    assert dataclasses.replace(GOOD, **full).recomputation() == full | {"recompute_modules": ["core_attn"]}
    check_recomputation(full, 4)
    with pytest.raises(
        MaskLLMError, match="--recompute-num-layers 2: with --recompute-method uniform wanted a divisor of a pipeline"
    ):
        check_recomputation(full, 3)
    with pytest.raises(MaskLLMError, match="--recompute-num-layers 2: wanted at most a pipeline stage's 1 layers"):
        check_recomputation(full | {"recompute_method": "block"}, 1)
    with pytest.raises(MaskLLMError, match="--recompute-num-layers: found 0, wanted at least 1"):
        dataclasses.replace(GOOD, **full | {"recompute_num_layers": 0}).check()


def test_a_global_batch_must_be_a_multiple_of_a_micro_batch_on_each_rank():
    arguments = dataclasses.replace(GOOD, global_batch_size=12, micro_batch_size=2)
    assert arguments.num_microbatches(3) == 2
    with pytest.raises(
        MaskLLMError, match="--global-batch-size 12: wanted a multiple of --micro-batch-size 2 x 4 data-parallel ranks"
    ):
        arguments.num_microbatches(4)


def test_a_blend_is_weights_and_prefixes(tmp_path):
    for name in "ab":
        for suffix in ("bin", "idx"):
            (tmp_path / f"{name}.{suffix}").touch()
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    def blend(*values: str):
        return dataclasses.replace(GOOD, data_path=list(values)).blend()

    assert blend(a) == ([a], None)
    assert blend("3", a, "0.5", b) == ([a, b], [3.0, 0.5])
    for values, message in (
        (("1", a, b), "found 3 values"),
        ((a, b), "a number before each prefix"),
        (("-1", a), "found the weight -1.0, wanted positive numbers"),
        (("nan", a), "found the weight nan"),
        (("0", a, "1", b), "found the weight 0.0"),
        ((str(tmp_path / "c"),), r"no file .*c\.bin"),
    ):
        with pytest.raises(MaskLLMError, match=message):
            blend(*values)


@pytest.mark.parametrize(
    ("option", "message"),
    [("--params-dtype=int8", "invalid choice: 'int8'"), ("--lr=fast", "invalid float"), ("--nonsense", "nonsense")],
)
def test_what_the_parser_refuses_ends_with_status_2(capsys, option, message):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--data-path", "data", option])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for entry in dataclasses.fields(TrainArguments):
        assert "--" + entry.name.replace("_", "-") in text
    assert "optimizer steps (default: 2000)" in text
    assert "steps of linear warm-up (default: 0)" in text
    assert "softmax temperature, first and last (default: 4.0 0.05)" in text
    assert "default: None" not in text
    assert "default: False" not in text


def test_sequences_longer_than_the_models_context_are_refused(tiny_pruned, tiny_dataset):
    arguments = dataclasses.replace(GOOD, load=str(tiny_pruned), seq_length=129)
    with pytest.raises(MaskLLMError, match=r"--seq-length 129: the model has a context of 128 tokens; use at most that"):
        resolve_start(arguments, arguments.check())
    arguments = dataclasses.replace(arguments, seq_length=128, data_path=[tiny_dataset])
    assert not resolve_start(arguments, arguments.check()).resumed


def test_saving_to_the_directory_of_the_starting_checkpoint_is_refused(tiny_pruned, tiny_dataset):
    arguments = dataclasses.replace(GOOD, load=str(tiny_pruned), save=str(tiny_pruned), seq_length=64, data_path=[tiny_dataset])
    with pytest.raises(MaskLLMError, match="holds the checkpoint that the run starts from; name another --save"):
        resolve_start(arguments, arguments.check())


@pytest.mark.parametrize("trained", ["masks", "weights", "both"])
def test_a_checkpoint_with_another_pattern_is_refused(trained, tiny_pruned):
    arguments = dataclasses.replace(GOOD, load=str(tiny_pruned), seq_length=64, pattern="1:4", train=trained)
    with pytest.raises(MaskLLMError, match="its masks have pattern 2:4; --pattern is 1:4"):
        resolve_start(arguments, arguments.check())


@pytest.fixture
def trained(tmp_path, tiny_pruned, tiny_dataset) -> Path:
    """A directory with the metadata of a trained checkpoint: `GOOD`'s settings, sequences of 64 tokens, `tiny_dataset`."""
    path = tmp_path / "iter_0000002"
    shutil.copytree(tiny_pruned / "release", path)
    info = json.loads((path / "maskllm.json").read_text())
    settings = {name: getattr(GOOD, name) for name in SETTINGS_THAT_MUST_MATCH} | {"seq_length": 64}
    details = {"iteration": 2, "settings": settings, "data": data_identity(dataclasses.replace(GOOD, data_path=[tiny_dataset]))}
    (path / "maskllm.json").write_text(json.dumps(info | {"stage": "trained", "details": details}))
    write_manifest(path)
    return path


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", 5, "--seed 5: the run in .* has 1234"),
        ("lr", 1e-3, "--lr 0.001: the run in .* has 5e-05"),
        ("prior_strength", 1.0, "--prior-strength 1.0: the run in .* has 3.0"),
        ("split", "9,1,0", "--split 9,1,0: the run in .* has 969,30,1"),
        ("use_distributed_optimizer", True, "--use-distributed-optimizer True: the run in .* has False"),
        ("gumbel_temperature_range", (2.0, 0.05), r"--gumbel-temperature-range \[2.0, 0.05\]: the run in .* has \[4.0, 0.05\]"),
    ],
)
def test_resuming_with_another_setting_is_refused(trained, tiny_dataset, name, value, message):
    arguments = dataclasses.replace(GOOD, load=str(trained), data_path=[tiny_dataset], seq_length=64)
    start = resolve_start(arguments, arguments.check())
    assert (start.resumed, start.iteration) == (True, 2)
    arguments = dataclasses.replace(arguments, **{name: value})
    with pytest.raises(MaskLLMError, match=message):
        resolve_start(arguments, arguments.check())


def test_a_setting_that_decides_nothing_may_differ_when_a_run_is_resumed(trained, tiny_dataset):
    info = json.loads((trained / "maskllm.json").read_text())
    info["details"]["settings"] |= {"weights_lr": 1e-3, "l1_decay_coeff": 1.0, "kl_temperature": 2.0}
    (trained / "maskllm.json").write_text(json.dumps(info))
    write_manifest(trained)
    arguments = dataclasses.replace(GOOD, load=str(trained), data_path=[tiny_dataset], seq_length=64)
    assert resolve_start(arguments, arguments.check()).resumed


def test_starting_from_weights_with_zeros_written_in_is_refused(tmp_path, tiny_pruned):
    path = tmp_path / "release"
    shutil.copytree(tiny_pruned / "release", path)
    info = json.loads((path / "maskllm.json").read_text())
    (path / "maskllm.json").write_text(json.dumps(info | {"details": {"update_weights": True}}))
    write_manifest(path)
    arguments = dataclasses.replace(GOOD, load=str(path), seq_length=64)
    with pytest.raises(MaskLLMError, match=r"zeros written in .*pruned without them"):
        resolve_start(arguments, arguments.check())


def test_resuming_a_checkpoint_without_its_settings_is_refused(trained, tiny_dataset):
    info = json.loads((trained / "maskllm.json").read_text())
    (trained / "maskllm.json").write_text(json.dumps(info | {"details": {"iteration": 2}}))
    write_manifest(trained)
    arguments = dataclasses.replace(GOOD, load=str(trained), data_path=[tiny_dataset], seq_length=64)
    with pytest.raises(MaskLLMError, match=r"maskllm\.json lacks the settings of the run; it cannot be resumed"):
        resolve_start(arguments, arguments.check())


def _cut(path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: _cut(path.with_suffix(".bin"), 0), r"data\.bin is empty"),
        (lambda path: _cut(path.with_suffix(".bin"), 0.5), r"data\.bin has \d+ bytes, its \.idx asks for \d+"),
        (lambda path: _cut(path.with_suffix(".idx"), 0), r"data\.idx is not an indexed dataset's index"),
        (lambda path: _cut(path.with_suffix(".idx"), 0.7), r"data\.idx has \d+ bytes, wanted \d+ for 40 sequences"),
        (lambda path: path.with_suffix(".idx").write_bytes(b"x" * 500), r"data\.idx is not an indexed dataset's index"),
    ],
)
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # upstream's reader would raise in its destructor
def test_a_damaged_dataset_is_named(tmp_path, tiny_dataset, damage, message):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"data{suffix}").write_bytes(Path(tiny_dataset + suffix).read_bytes())
    damage(tmp_path / "data")
    arguments = dataclasses.replace(GOOD, data_path=[str(tmp_path / "data")], seq_length=64, eval_iters=0)
    with pytest.raises(MaskLLMError, match=message):
        build_batches(arguments, 256, "cpu")
