"""Training the weights: under fixed masks, or with the masks; against the dense teacher; under every layout; resumed; exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from maskllm import train
from maskllm.checkpoints.finding import LATEST
from maskllm.checkpoints.info import TRAINED_WEIGHTS
from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.export.trim import trim
from maskllm.families.registry import parameter_map
from maskllm.ops import winner_mask
from maskllm.patterns import Pattern, unpack_mask
from maskllm.training.loop import Trainer
from tests.training.conftest import arguments, assert_moves_to_another_layout, assert_resumes_with_the_same_bits, metrics, tensors

STEPS = 10
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "tp2": (2, TP2),
    "tp2_sequence_parallel": (2, TP2 | {"sequence_parallel": True}),
    "pp2": (2, PP2),
    "dp2": (2, {}),
    "dp2_distributed_optimizer": (2, {"use_distributed_optimizer": True}),
    "tp2_pp2": (4, TP2 | PP2),
}
ALONE = ("tp2", "pp2", "dp2", "dp2_distributed_optimizer")
"""Layouts for -m long: the others combine them, and the runs that are resumed have two data-parallel ranks."""
OPTIONS = {
    "steps": STEPS, "save_interval": STEPS // 2, "eval_iters": 1, "eval_interval": STEPS // 2, "split": "80,20,0", "weights_lr": 0.003,
    "weights_weight_decay": 0.01, "ce_loss_coeff": 0.5, "kl_loss_coeff": 0.5, "kl_temperature": 2.0, "squarehead_loss_coeff": 0.1,
}  # fmt: skip
TRAINED = {
    "masks": {},
    "weights": {"train_embeddings": True},
    "both": {"weights_start_iter": 2},
}
TERMS = ("loss", "kl", "squarehead")


def options(trained: str, **more: object) -> dict[str, object]:
    """The options of a run with `--train trained`."""
    weights = {name for name in OPTIONS if name.startswith("weights_")} if trained == "masks" else set()
    return {name: value for name, value in OPTIONS.items() if name not in weights} | TRAINED[trained] | {"train": trained} | more


@pytest.fixture(scope="module")
def single(tmp_path_factory, ranks, tiny_dataset, tiny_pruned):
    """Runs of one process in fp32, by what is trained."""
    runs: dict[str, Path] = {}

    def run(trained: str) -> Path:
        if trained not in runs:
            runs[trained] = tmp_path_factory.mktemp(trained) / "single"
            ranks(1, "maskllm.train", *arguments(runs[trained], tiny_dataset, tiny_pruned, **options(trained)))
        return runs[trained]

    return run


def assert_same_run(one: Path, other: Path) -> None:
    """The same losses to fp32 rounding, and the same weights and masks."""
    for kind, keys in (("train", (*TERMS, "grad_norm")), ("validation", tuple(f"{term}_winner" for term in TERMS))):
        expected, found = metrics(one, kind), metrics(other, kind)
        assert len(expected) == len(found) > 0
        for first, second in zip(expected, found, strict=True):
            for key in [*keys, *(key for key in first if key == "weights_grad_norm")]:
                rel = 1e-4 if key.endswith("grad_norm") else 2e-5
                assert second[key] == pytest.approx(first[key], rel=rel), (first["iteration"], key)
    first, second = tensors(one), tensors(other)
    for name in first.keys() & second.keys():
        if not name.startswith("optimizer"):
            assert torch.isclose(first[name].float(), second[name].float(), rtol=1e-3, atol=1e-4).float().mean() > 0.999, name


@pytest.mark.slow
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.long] * (name in ALONE)) for name in LAYOUTS])
def test_a_layout_gives_the_run_of_a_single_process(layout, trained, single, ranks, tmp_path, tiny_dataset, tiny_pruned):
    processes, sizes = LAYOUTS[layout]
    ranks(processes, "maskllm.train", *arguments(tmp_path / "run", tiny_dataset, tiny_pruned, **options(trained, **sizes)))
    first, *_, last = metrics(single(trained))
    assert last["loss"] < first["loss"], "the run learns too little to tell layouts apart"
    assert_same_run(single(trained), tmp_path / "run")


def test_weights_that_a_fixed_mask_removes_stay_zero_and_the_others_move(single, tiny_pruned):
    before, after = tensors(tiny_pruned), tensors(single("weights"))
    for name, weight in before.items():
        bits = before.get(f"{name.removesuffix('.weight')}.mask_bits")
        if bits is not None:
            mask = unpack_mask(bits, weight.shape[1])
            assert torch.equal(after[name] != 0, mask & (after[name] != 0))
            assert (after[name][mask] != weight.float()[mask]).float().mean() > 0.9, name
            assert torch.equal(after[f"{name.removesuffix('.weight')}.mask_bits"], bits)
        elif not name.endswith("mask_bits"):
            assert not torch.equal(after[name], weight.float()), f"{name} has not moved"


def test_masks_learn_alone_before_the_weights_start(single):
    rates = [line["weights_learning_rate"] for line in metrics(single("both"))]
    assert rates[:2] == [0, 0]
    assert all(rate > 0 for rate in rates[2:])


def test_frozen_weights_learn_from_themselves_without_masks(single, tiny_pruned):
    before, after = tensors(tiny_pruned), tensors(single("masks"))
    assert all(torch.equal(after[name], weight) for name, weight in before.items()), "a frozen tensor has changed"
    assert "teacher" not in resolve(single("masks")).info.details
    assert all(line["kl"] > 0 and line["squarehead"] > 0 for line in metrics(single("masks")))


@pytest.mark.parametrize(
    ("trained", "more"),
    [("both", {}), ("weights", {"use_distributed_optimizer": True}), pytest.param("weights", {}, marks=pytest.mark.long)],
)
def test_a_resumed_run_in_bf16_has_the_bits_of_an_uninterrupted_one(trained, more, ranks, tmp_path, tiny_dataset, tiny_pruned):
    """Weights, fp32 masters, moments and logits."""
    run = options(trained, params_dtype="bf16", **more) | {"steps": 6, "save_interval": 3}
    whole = assert_resumes_with_the_same_bits(ranks, tmp_path, arguments(tmp_path / "run", tiny_dataset, tiny_pruned, **run))
    assert any("param.decoder" in name for name in whole), "no masters are saved"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "before", "after"),
    [
        ("weights", {"use_distributed_optimizer": True}, TP2 | {"use_distributed_optimizer": True}),
        ("both", TP2, PP2),
    ],
)
def test_another_layout_loads_all_bits_of_a_run_in_bf16(trained, before, after, ranks, tmp_path, tiny_dataset, tiny_pruned):
    """Weights, masters, logits, and the moments of both groups."""
    run = options(trained, params_dtype="bf16") | {"steps": 3, "save_interval": 3, "eval_iters": 0}
    whole = assert_moves_to_another_layout(
        ranks, tmp_path, lambda save, **more: arguments(save, tiny_dataset, tiny_pruned, **run | more), before, after
    )
    linear = "decoder.layers.1.mlp.linear_fc1"
    master = "param" if before.get("use_distributed_optimizer") else "fp32_param"
    kinds = [f"{linear}.weight", *[f"{linear}.mask_logits"] * (trained == "both")]
    wanted = {f"optimizer.state.{name}.{kind}" for name in ("exp_avg", "exp_avg_sq") for kind in kinds}
    assert wanted | {f"optimizer.state.{master}.{linear}.weight"} <= whole.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "layout"), [("weights", TP2), ("both", PP2)])
def test_a_run_goes_on_under_another_layout(trained, layout, single, ranks, tmp_path, tiny_dataset, tiny_pruned):
    """From the middle, with the counts of Adam's steps and the learning rates."""
    start = single(trained) / f"iter_{STEPS // 2:07d}"
    ranks(2, "maskllm.train", *arguments(tmp_path / "run", tiny_dataset, tiny_pruned, **options(trained, load=start, **layout)))
    expected, found = metrics(single(trained))[STEPS // 2 :], metrics(tmp_path / "run")
    assert [line["iteration"] for line in found] == list(range(STEPS // 2 + 1, STEPS + 1))
    for first, second in zip(expected, found, strict=True):
        for key in (*TERMS, "learning_rate", *(key for key in first if key == "weights_learning_rate")):
            assert second[key] == pytest.approx(first[key], rel=2e-5), (first["iteration"], key)
    whole, other = tensors(single(trained)), tensors(tmp_path / "run")
    assert whole.keys() == other.keys()
    for name, tensor in whole.items():
        close = torch.isclose(tensor.double(), other[name].double(), rtol=1e-3, atol=1e-4)
        assert close.double().mean() > 0.999, name


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["weights", "both"])
def test_trained_weights_are_exported_in_their_first_dtype(trained, ranks, capsys, tmp_path, tiny_dataset, tiny_pruned):
    """The tiny model is in bf16. Its masters are rounded once, and zeros are where the masks say.

    Every step says that a mask file is not enough.
    """
    run = options(trained, params_dtype="bf16", steps=3)
    ranks(1, "maskllm.train", *arguments(tmp_path / "run", tiny_dataset, tiny_pruned, **run))
    for verb, *paths in (
        ("trim", "--load", tmp_path / "run", "--output", tmp_path / "trimmed"),
        ("export", "--load", tmp_path / "trimmed", "--output", tmp_path / "hf"),
    ):
        assert main([verb, *map(str, paths), "--json", str(tmp_path / verb)]) == 0
        assert f"the weights were {TRAINED_WEIGHTS}\n" in capsys.readouterr().out
        assert json.loads((tmp_path / verb).read_text())["trained_weights"] is True
    assert resolve(tmp_path / "run").info.details["weights"] == TRAINED_WEIGHTS
    stored, config = tensors(tmp_path / "run"), resolve(tmp_path / "run").model_config
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    dtype = resolve(tiny_pruned).tensors["embedding.word_embeddings.weight"].dtype
    for mapping in parameter_map(config):
        master = stored.get(f"optimizer.state.fp32_param.{mapping.megatron}", stored[mapping.megatron])
        if mapping.linear is not None:
            bits = stored.get(f"{mapping.linear}.mask_bits")
            logits = stored.get(f"{mapping.linear}.mask_logits")
            mask = unpack_mask(bits, master.shape[1]) if logits is None else winner_mask(logits, Pattern(2, 4))
            assert logits is not None or not master[~mask].any()
            master = master * mask
        for name, part in zip(mapping.hf, mapping.to_hf(master.to(dtype), config), strict=True):
            assert torch.equal(exported[name], part), name
    details = json.loads((tmp_path / "trimmed" / "release" / "maskllm.json").read_text())["details"]
    assert (details["weights"], details["weights_dtype"]) == (TRAINED_WEIGHTS, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("trained", TRAINED)
def test_trim_knows_whether_a_run_is_at_its_end(trained, single, tmp_path):
    middle = trim(single(trained) / f"iter_{STEPS // 2:07d}", tmp_path / "middle")
    assert (middle.steps_done, middle.steps_planned, middle.is_unfinished) == (STEPS // 2, STEPS, True)
    end = trim(single(trained), tmp_path / "end")
    assert (end.steps_done, end.steps_planned, end.is_unfinished) == (STEPS, STEPS, False)


def refused(capfd: pytest.CaptureFixture, words: list[str]) -> str:
    """What the program says when it refuses to train."""
    assert train.main(words) == 1
    return capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.usefixtures("signal_handlers")
def test_what_cannot_be_trained_is_refused_in_one_line(capfd, tmp_path, tiny_dataset, tiny_dense, tiny_pruned, single):
    def words(start: Path, **more: object) -> list[str]:
        return arguments(tmp_path / "run", tiny_dataset, start, **{"load": tmp_path / "none", **more})

    assert main(["trim", "--load", str(tiny_pruned), "--output", str(tmp_path / "trimmed")]) == 0
    for start, more, message in (
        (tiny_dense, {"train": "weights"}, "is a dense checkpoint, which has no masks"),
        (tmp_path / "trimmed", {"train": "masks"}, "a trimmed checkpoint's weights have their zeros written in"),
        (tmp_path / "trimmed", {"train": "both"}, "a trimmed checkpoint's weights have their zeros written in"),
        (tmp_path / "trimmed", {"train": "weights", "kl_loss_coeff": 1.0}, "its weights are not dense"),
        (single("both"), {"train": "masks"}, "its run had --train both"),
        (tiny_pruned, {"train": "weights", "weights_start_iter": 2}, "--weights-start-iter: wanted only with --train both"),
        (tiny_pruned, {"train_embeddings": True}, "--train-embeddings: wanted only with --train weights"),
        (tiny_pruned, {"train": "both", "mask_logits_dtype": "bf16"}, "--mask-logits-dtype bf16: only --train masks"),
        (tiny_pruned, {"ce_loss_coeff": 0.0}, "--ce-loss-coeff 0: nothing is minimized"),
        (tiny_pruned, {"teacher": tiny_dense}, "--teacher: wanted only with --kl-loss-coeff"),
        (single("both"), {"train": "weights"}, "start --train weights from what `maskllm trim` makes of it"),
        (single("weights"), {"train": "weights"}, "start a new run from what `maskllm trim` makes of it"),
        (tiny_pruned, {"train": "weights", "adam_eps": 0.0}, "--adam-eps 0: with --train weights wanted a positive number"),
        (tiny_pruned, {"kl_loss_coeff": 1.0, "teacher": tmp_path / "no"}, "--teacher: "),
    ):
        assert message in refused(capfd, words(start, **more)), more


@pytest.mark.usefixtures("signal_handlers")
def test_a_run_that_trains_weights_starts_from_a_trimmed_checkpoint_with_a_teacher(tmp_path, tiny_dataset, tiny_dense, tiny_pruned):
    assert main(["trim", "--load", str(tiny_pruned), "--output", str(tmp_path / "trimmed")]) == 0
    run = {"train": "weights", "kl_loss_coeff": 1.0, "teacher": tiny_dense, "steps": 2}
    assert train.main(arguments(tmp_path / "run", tiny_dataset, tmp_path / "trimmed", **run)) == 0
    assert Path(resolve(tmp_path / "run").info.details["teacher"]["path"]) == resolve(tiny_dense).path.resolve()
    assert all("kl" in line for line in metrics(tmp_path / "run"))
    assert not any("squarehead" in line for line in metrics(tmp_path / "run")), "a term that is not computed is logged"


@pytest.mark.usefixtures("signal_handlers")
def test_masks_of_no_pattern_and_masks_of_a_run_are_fixed_too(tmp_path, tiny_dataset, tiny_dense, single):
    unstructured = (
        "prune",
        "--load",
        str(tiny_dense),
        "--output",
        str(tmp_path / "half"),
        "--method",
        "magnitude",
        "--sparsity",
        "0.5",
    )
    assert main([*unstructured]) == 0
    for name, start in (("half", tmp_path / "half"), ("learned", single("masks"))):
        run = {"train": "weights", "steps": 2, "weights_lr": 0.003}
        assert train.main(arguments(tmp_path / f"{name}_run", tiny_dataset, start, **run)) == 0
        assert resolve(tmp_path / f"{name}_run").info.pattern == resolve(start).info.pattern
        before, after = tensors(start), tensors(tmp_path / f"{name}_run")
        for linear in (key.removesuffix(".mask_bits") for key in after if key.endswith(".mask_bits")):
            logits = before.get(f"{linear}.mask_logits")
            weight = after[f"{linear}.weight"]
            bits = unpack_mask(before[f"{linear}.mask_bits"], weight.shape[1])
            mask = bits if logits is None else winner_mask(logits, Pattern(2, 4))
            assert torch.equal(unpack_mask(after[f"{linear}.mask_bits"], weight.shape[1]), mask), linear
            assert not weight[~mask].any(), linear


@pytest.mark.usefixtures("signal_handlers")
def test_weights_and_masks_go_on_from_masks_that_were_learned(tmp_path, tiny_dataset, single):
    """With a rate of nearly 0 the logits are those of the run before."""
    run = {"train": "both", "steps": 1, "lr": 1e-12, "min_lr": 0.0, "weight_decay": 0.0}
    assert train.main(arguments(tmp_path / "run", tiny_dataset, single("masks"), **run)) == 0
    before, after = tensors(single("masks")), tensors(tmp_path / "run")
    logits = [name for name in after if name.endswith("mask_logits") and not name.startswith("optimizer")]
    assert logits
    for name in logits:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("trained", ["weights", "both"])
@pytest.mark.usefixtures("signal_handlers")
def test_a_run_from_bf16_logits_saves_its_own_logits(trained, tmp_path, tiny_dataset, tiny_pruned):
    """Its logits are fp32, or gone if their winners are fixed: never those of the run before."""
    masks = tmp_path / "masks"
    assert train.main(arguments(masks, tiny_dataset, tiny_pruned, steps=2, mask_logits_dtype="bf16")) == 0
    assert train.main(arguments(tmp_path / "run", tiny_dataset, masks, steps=2, **{"train": trained})) == 0
    before, after = tensors(masks), tensors(tmp_path / "run")
    names = [name for name in before if name.endswith("mask_logits") and not name.startswith("optimizer")]
    assert names and all(before[name].dtype == torch.bfloat16 for name in names)
    for name in names:
        if trained == "both":
            assert after[name].dtype == torch.float32
            assert (after[name] != before[name].float()).float().mean() > 0.99, name
        else:
            bits = after[f"{name.removesuffix('.mask_logits')}.mask_bits"]
            winners = winner_mask(before[name].float(), Pattern(2, 4))
            assert name not in after and torch.equal(unpack_mask(bits, winners.shape[1]), winners)


@pytest.mark.usefixtures("signal_handlers")
def test_a_teacher_that_is_broken_or_of_another_shape_is_refused(capfd, tmp_path, tiny_dataset, tiny_pruned):
    """The tiny model and these teachers have a byte vocabulary."""
    config = resolve(tiny_pruned).hf_directory / "config.json"
    values = json.loads(config.read_text())
    for name, change, message in (
        ("nan", {}, "has values that are not finite"),
        ("short", {"num_hidden_layers": values["num_hidden_layers"] + 2}, "has num_layers"),
        ("words", {"vocab_size": values["vocab_size"] + 7}, "has vocab_size"),
    ):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values | change))
        if name == "nan":
            model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
        model.save_pretrained(tmp_path / name)
        assert main(["convert", "--hf", str(tmp_path / name), "--output", str(tmp_path / f"{name}_dense")]) == 0
        run = {"train": "weights", "kl_loss_coeff": 1.0, "teacher": tmp_path / f"{name}_dense", "load": tmp_path / "none"}
        assert message in refused(capfd, arguments(tmp_path / "run", tiny_dataset, tiny_pruned, **run))


def test_a_sparse_model_that_was_converted_is_neither_a_dense_start_nor_a_teacher(capfd, tmp_path, tiny_dataset, tiny_pruned):
    """Its checkpoint calls itself dense."""
    trimmed, hf, converted = (tmp_path / name for name in ("trimmed", "hf", "converted"))
    for verb, *paths in (
        ("trim", "--load", tiny_pruned, "--output", trimmed),
        ("export", "--load", trimmed, "--output", hf),
        ("convert", "--hf", hf, "--output", converted),
    ):
        assert main([verb, *map(str, paths)]) == 0
    teacher = {"kl_loss_coeff": 1.0, "teacher": converted}
    for start, run, message in (
        (converted, {"train": "both"}, "masks are chosen from dense weights, and 50% of these are zero"),
        (
            converted,
            {"train": "weights", "weights_optimizer": "cast"},
            "masks are chosen from dense weights, and 50% of these are zero",
        ),
        (trimmed, {"train": "weights", **teacher}, "a teacher is a dense model, and 50% of these are zero"),
        (tiny_pruned, {"train": "masks", **teacher}, "a teacher is a dense model, and 50% of these are zero"),
    ):
        assert message in refused(capfd, arguments(tmp_path / "run", tiny_dataset, start, **{"load": tmp_path / "none", **run}))


@pytest.mark.parametrize("trained", ["masks", "both"])
@pytest.mark.usefixtures("signal_handlers")
def test_a_resumed_run_keeps_its_teacher(trained, capfd, tmp_path, tiny_dataset, tiny_dense, tiny_pruned):
    """It finds the teacher by itself. It refuses another one, and says which checkpoint is missing if the teacher has gone."""
    teacher, save, run = tmp_path / "teacher", tmp_path / "run", {"train": trained, "steps": 4, "kl_loss_coeff": 1.0}
    shutil.copytree(tiny_dense, teacher)
    assert train.main(arguments(save, tiny_dataset, tiny_pruned, teacher=teacher, **run)) == 0
    whole = tensors(save)
    (save / LATEST).write_text("2\n")
    assert "is not the teacher of the run" in refused(capfd, arguments(save, tiny_dataset, tiny_pruned, teacher=tiny_pruned, **run))
    teacher.rename(tmp_path / "moved")
    assert "it is the teacher of the run in" in refused(capfd, arguments(save, tiny_dataset, tiny_pruned, **run))
    (tmp_path / "moved").rename(teacher)
    shutil.rmtree(resolve(save).path.with_name("iter_0000004"))
    assert train.main(arguments(save, tiny_dataset, tiny_pruned, **run)) == 0
    assert resolve(save).info.details["teacher"]["path"] == str(resolve(teacher).path)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(save).items())


@pytest.mark.usefixtures("signal_handlers")
def test_a_run_that_learns_from_its_own_weights_resumes_without_another_teacher(
    capfd, tmp_path, tiny_dataset, tiny_dense, tiny_pruned
):
    run = {"steps": 4, "kl_loss_coeff": 1.0}
    assert train.main(arguments(tmp_path / "run", tiny_dataset, tiny_pruned, **run)) == 0
    (tmp_path / "run" / LATEST).write_text("2\n")
    words = arguments(tmp_path / "run", tiny_dataset, tiny_pruned, teacher=tiny_dense, **run)
    assert "learns from its own weights without their masks; leave it out" in refused(capfd, words)


@pytest.mark.parametrize("layout", [{}, {"use_distributed_optimizer": True}], ids=["mixed_precision", "distributed_optimizer"])
def test_masters_start_from_all_bits_of_the_checkpoint(layout, ranks, tmp_path, tiny_hf, tiny_dataset):
    """A checkpoint in fp32, trained in bf16: with a rate of nearly 0, the weights that are exported are the checkpoint's."""
    model = AutoModelForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3 * torch.rand_like(parameter))
    model.save_pretrained(tmp_path / "hf")
    for verb, *words in (
        ("convert", "--hf", tmp_path / "hf", "--output", tmp_path / "dense"),
        ("prune", "--load", tmp_path / "dense", "--output", tmp_path / "pruned", "--method", "magnitude"),
    ):
        assert main([verb, *map(str, words)]) == 0
    run = {"train": "weights", "train_embeddings": True, "params_dtype": "bf16", "weights_lr": 1e-12, "steps": 1, **layout}
    ranks(
        2, "maskllm.train", *arguments(tmp_path / "run", tiny_dataset, tmp_path / "pruned", pipeline_model_parallel_size=2, **run)
    )
    ranks(2, "maskllm.train", *arguments(tmp_path / "two", tiny_dataset, tmp_path / "pruned", **run))
    before = tensors(tmp_path / "pruned")
    for name in ("run", "two"):
        assert main(["trim", "--load", str(tmp_path / name), "--output", str(tmp_path / f"{name}_trimmed")]) == 0
        after = tensors(tmp_path / f"{name}_trimmed")
        for key, weight in before.items():
            if not key.endswith("mask_bits"):
                bits = before.get(f"{key.removesuffix('.weight')}.mask_bits")
                expected = weight if bits is None else weight * unpack_mask(bits, weight.shape[1])
                torch.testing.assert_close(after[key], expected, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("signal_handlers")
def test_a_run_goes_on_saving_when_its_teacher_has_gone(monkeypatch, tmp_path, tiny_dataset, tiny_dense, tiny_pruned):
    """Its teacher is in memory."""
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_dense, teacher)
    one_step = Trainer._one_step
    monkeypatch.setattr(Trainer, "_one_step", lambda self: (shutil.rmtree(teacher, ignore_errors=True), one_step(self))[1])
    run = {"train": "both", "steps": 2, "kl_loss_coeff": 1.0, "teacher": teacher}
    assert train.main(arguments(tmp_path / "run", tiny_dataset, tiny_pruned, **run)) == 0
    assert not teacher.exists()
    assert resolve(tmp_path / "run").info.details["teacher"]["path"] == str(teacher / "release")
