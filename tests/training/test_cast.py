"""CAST: a dense model is trained toward its mask by magnitude; under every layout, resumed, validated, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskllm import train
from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.evaluation.megatron import load_masked_model, megatron_window_nlls, zero_share
from maskllm.families.registry import parameter_map
from maskllm.masking.parameter import use_winners
from maskllm.masking.sampler import MaskSampler
from maskllm.masking.scaling import GROUPS
from maskllm.megatron.build import build_model
from maskllm.megatron.linears import attach_scales, masked_parameters
from maskllm.megatron.process_groups import parallel_processes
from maskllm.ops.winner import check_mask
from maskllm.patterns import Pattern, unpack_mask
from maskllm.training.arguments import TrainArguments
from maskllm.training.data_parallel import data_parallel
from maskllm.training.optimizer import build_optimizer, unchained
from maskllm.training.trainables import parameter_groups
from tests.training.conftest import arguments, assert_moves_to_another_layout, assert_resumes_with_the_same_bits, metrics, tensors

PATTERN = Pattern(2, 4)
STEPS = 10
OPTIONS = {
    "train": "weights", "weights_optimizer": "cast", "mask_refresh_interval": 2, "l1_decay_coeff": 0.01,
    "steps": STEPS, "save_interval": STEPS // 2, "eval_iters": 1, "eval_interval": STEPS // 2, "split": "80,20,0", "weights_lr": 0.003,
    "ce_loss_coeff": 0.67, "kl_loss_coeff": 0.33,
}  # fmt: skip
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "tp2": (2, TP2),
    "tp2_sequence_parallel": (2, TP2 | {"sequence_parallel": True}),
    "pp2": (2, PP2),
    "dp2": (2, {}),
    "dp2_distributed_optimizer": (2, {"use_distributed_optimizer": True}),
    "tp2_pp2": (4, TP2 | PP2),
}
ALONE = ("tp2", "pp2", "dp2")
"""For -m long: the others combine them."""


@pytest.fixture(scope="module")
def single(tmp_path_factory, ranks, tiny_dataset, tiny_dense) -> Path:
    """The run of one process in fp32."""
    save = tmp_path_factory.mktemp("cast") / "single"
    ranks(1, "maskllm.train", *arguments(save, tiny_dataset, tiny_dense, **OPTIONS))
    return save


def largest(weight: torch.Tensor) -> torch.Tensor:
    """The mask of the two largest of each four, by sorting."""
    blocks = weight.abs().view(-1, 4)
    order = blocks.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order[:, :2], True).view(weight.shape)


def linears_of(stored: dict[str, torch.Tensor]) -> list[str]:
    """The names of the masked linears."""
    suffix = ".weight_scales"
    return [name.removesuffix(suffix) for name in stored if name.endswith(suffix) and not name.startswith("optimizer")]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.long] * (name in ALONE)) for name in LAYOUTS])
def test_a_layout_gives_the_run_of_a_single_process(layout, single, ranks, tmp_path, tiny_dataset, tiny_dense):
    processes, sizes = LAYOUTS[layout]
    save = tmp_path / "run"
    ranks(processes, "maskllm.train", *arguments(save, tiny_dataset, tiny_dense, **OPTIONS, **sizes))
    for kind, keys in (
        ("train", ("loss", "kl", "grad_norm", "l1_decay", "changed_since_refresh", "l1_outside_mask")),
        ("validation", ("loss_dense", "loss_winner", "kl_winner")),
    ):
        expected, found = metrics(single, kind), metrics(save, kind)
        assert len(expected) == len(found) > 0
        for first, second in zip(expected, found, strict=True):
            for key in keys:
                close = {"grad_norm": 1e-4, "changed_since_refresh": 1e-2}.get(key, 2e-5)
                is_close = second[key] == first[key] or second[key] == pytest.approx(first[key], rel=close, abs=1e-6)
                assert is_close, (first["iteration"], key, first[key], second[key])
    first, second = tensors(single), tensors(save)
    for name in first.keys() & second.keys():
        if name.endswith("mask_bits"):
            assert (first[name] == second[name]).float().mean() > 0.999, name
        elif not name.startswith("optimizer"):
            assert torch.isclose(first[name], second[name], rtol=1e-3, atol=1e-4).float().mean() > 0.999, name


def test_all_weights_and_scales_move_and_the_masks_are_the_refreshed_ones(single, tiny_dense):
    """The mask bits in the checkpoint are those of the refresh before step 9, so of the weights after eight steps."""
    before, after = tensors(tiny_dense), tensors(single)
    linears = linears_of(after)
    assert len(linears) == 4 * resolve(tiny_dense).model_config.num_layers
    assert all((after[f"{linear}.weight_scales"] != 1).any() for linear in linears)
    changed = 0
    for linear in linears:
        moved = after[f"{linear}.weight"] != before[f"{linear}.weight"].float()
        assert moved.float().mean() > 0.99, linear
        bits = unpack_mask(after[f"{linear}.mask_bits"], moved.shape[1])
        assert torch.equal(bits.view(-1, 4).sum(-1), torch.full((bits.numel() // 4,), 2)), linear
        changed += int((bits != largest(after[f"{linear}.weight"])).view(-1, 4).any(-1).sum())
    lines = metrics(single)
    assert [line["l1_decay"] for line in lines] == pytest.approx([0.01 * step / STEPS for step in range(STEPS)])
    assert [line["changed_since_refresh"] is None for line in lines] == [True, True] + [False] * 8
    blocks = sum(after[f"{linear}.weight"].numel() // 4 for linear in linears)
    assert lines[-1]["changed_since_refresh"] == pytest.approx(changed / blocks)
    outside = sum(after[f"{linear}.weight"].abs().masked_fill(largest(after[f"{linear}.weight"]), 0).sum() for linear in linears)
    whole = sum(after[f"{linear}.weight"].abs().sum() for linear in linears)
    assert lines[-1]["l1_outside_mask"] == pytest.approx(float(outside / whole), rel=1e-5)


@pytest.mark.parametrize("more", [{}, {"use_distributed_optimizer": True}])
def test_a_resumed_run_in_bf16_has_the_bits_of_an_uninterrupted_one(more, ranks, tmp_path, tiny_dataset, tiny_dense):
    """Weights, fp32 masters, moments, masks and scales. Step 4 is between two refreshes of the masks."""
    run = OPTIONS | {"params_dtype": "bf16", "steps": 6, "save_interval": 3, **more}
    whole = assert_resumes_with_the_same_bits(ranks, tmp_path, arguments(tmp_path / "run", tiny_dataset, tiny_dense, **run))
    assert any("param.decoder" in name for name in whole), "no masters are saved"
    assert whole[f"{linears_of(whole)[0]}.weight_scales"].dtype == torch.float32


@pytest.mark.slow
def test_another_layout_loads_all_bits_of_a_run_in_bf16(ranks, tmp_path, tiny_dataset, tiny_dense):
    """Weights, masters, masks, scales and the moments of both groups."""
    run = OPTIONS | {"params_dtype": "bf16", "steps": 3, "eval_iters": 0}
    whole = assert_moves_to_another_layout(
        ranks, tmp_path, lambda save, **more: arguments(save, tiny_dataset, tiny_dense, **run | more), TP2, PP2
    )
    kinds = [f"{linear}.{kind}" for linear in linears_of(whole) for kind in ("weight", "weight_scales")]
    assert {f"optimizer.state.{name}.{kind}" for name in ("exp_avg", "exp_avg_sq") for kind in kinds} <= whole.keys()
    assert {f"optimizer.state.fp32_param.{kind}" for kind in kinds if kind.endswith(".weight")} <= whole.keys()


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(single, ranks, tmp_path, tiny_dataset, tiny_dense):
    """From the middle: step 6 uses the masks of the refresh before step 5."""
    start = single / f"iter_{STEPS // 2:07d}"
    ranks(2, "maskllm.train", *arguments(tmp_path / "run", tiny_dataset, tiny_dense, **OPTIONS | {"load": start} | TP2))
    expected, found = metrics(single)[STEPS // 2 :], metrics(tmp_path / "run")
    assert [line["iteration"] for line in found] == list(range(STEPS // 2 + 1, STEPS + 1))
    for first, second in zip(expected, found, strict=True):
        for key in ("loss", "kl", "l1_decay", "learning_rate"):
            assert second[key] == pytest.approx(first[key], rel=2e-5), (first["iteration"], key)
    whole, other = tensors(single), tensors(tmp_path / "run")
    assert whole.keys() == other.keys()
    for name, tensor in whole.items():
        close = torch.isclose(tensor.double(), other[name].double(), rtol=1e-3, atol=1e-4)
        assert close.double().mean() > 0.999, name


@pytest.mark.slow
@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_exported_model_has_the_masters_times_the_scales_under_the_final_mask(dtype, tmp_path, tiny_dataset, tiny_dense):
    assert train.main(arguments(tmp_path / "run", tiny_dataset, tiny_dense, **OPTIONS | {"params_dtype": dtype})) == 0
    for verb, *paths in (
        ("trim", "--load", tmp_path / "run", "--output", tmp_path / "trimmed"),
        ("export", "--load", tmp_path / "trimmed", "--output", tmp_path / "hf"),
    ):
        assert main([verb, *map(str, paths)]) == 0
    stored, config = tensors(tmp_path / "run"), resolve(tmp_path / "run").model_config
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    before = resolve(tiny_dense).tensors["embedding.word_embeddings.weight"].dtype
    for mapping in parameter_map(config):
        weight = stored.get(f"optimizer.state.fp32_param.{mapping.megatron}", stored[mapping.megatron])
        if mapping.linear is not None:
            mask = largest(stored[mapping.megatron])
            scales = stored[f"{mapping.linear}.weight_scales"].repeat_interleave(mask.shape[1] // GROUPS, 1)
            weight = torch.where(mask, weight * scales, 0)
            check_mask(weight, PATTERN, mapping.linear)
        for name, part in zip(mapping.hf, mapping.to_hf(weight.to(before), config), strict=True):
            assert torch.equal(exported[name], part), name
    tokens, found = torch.randint(256, (32,), generator=torch.Generator().manual_seed(0)), []
    for name in ("run", "trimmed"):
        with parallel_processes():
            model = load_masked_model(resolve(tmp_path / name), torch.float32)
            with use_winners(masked_parameters(model)):
                assert zero_share(model) == pytest.approx(0.5), name
                found.append(megatron_window_nlls(model)(tokens[None])[0])
    assert found[0] == pytest.approx(found[1], rel=1e-3), "more than the rounding to the first dtype"


@pytest.mark.slow
@pytest.mark.usefixtures("signal_handlers")
def test_the_decay_empties_what_is_outside_of_the_mask(tmp_path, tiny_dataset, tiny_dense):
    """At the end the model with its mask has the loss of the dense one, and its magnitudes lie inside of the mask."""
    run = OPTIONS | {"steps": 60, "weights_lr": 0.01, "weights_min_lr": 1e-4, "eval_interval": 60, "save_interval": 60}
    assert train.main(arguments(tmp_path / "run", tiny_dataset, tiny_dense, **run)) == 0
    lines, (validation,) = metrics(tmp_path / "run"), metrics(tmp_path / "run", "validation")
    at_first = next(line["l1_outside_mask"] for line in lines if line["l1_outside_mask"] is not None)
    assert at_first > 0.2
    assert lines[-1]["l1_outside_mask"] < 0.02
    assert validation["loss_winner"] == pytest.approx(validation["loss_dense"], abs=0.02)
    assert lines[-1]["changed_since_refresh"] < 0.02


@pytest.mark.parametrize("params_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_scales_are_a_group_of_their_own_without_weight_decay(params_dtype, decay, tiny_dense):
    given = TrainArguments(train="weights", weights_optimizer="cast", params_dtype=params_dtype, weights_weight_decay=decay)
    with parallel_processes():
        built = build_model(resolve(tiny_dense).model_config, params_dtype=given.dtype)
        attach_scales(built, MaskSampler(PATTERN))
        masked = masked_parameters(built)
        groups = parameter_groups(given, built, masked)
        optimizer = build_optimizer(given, groups, masked, data_parallel(given, built))
        adam = unchained(optimizer).optimizer
    assert [group.name for group in groups] == ["weight_scales", *["norms_and_biases"] * bool(decay), "weights"]
    assert set(map(id, groups[0].parameters)) == {id(parameter.scales) for parameter in masked}
    assert [settings["wd_mult"] for settings in optimizer.param_groups] == [0.0] * len(groups[1:]) + [float(decay > 0)]
    for group, settings in zip(groups, optimizer.param_groups, strict=True):
        updated = {getattr(parameter, "main_param", parameter) for parameter in group.parameters}
        assert updated == set(settings["params"]), group.name
        assert all(parameter.dtype == torch.float32 for parameter in updated)
    assert len(adam.kept) == len(masked)


@pytest.mark.usefixtures("signal_handlers")
def test_what_cast_cannot_do_is_refused_in_one_line(capfd, tmp_path, tiny_dataset, tiny_dense, tiny_pruned, single):
    for start, more, message in (
        (tiny_pruned, {}, "is a pruned checkpoint; --weights-optimizer cast starts from a dense one"),
        (tiny_dense, {"train": "both"}, "--weights-optimizer cast: wanted --train weights, found --train both"),
        (tiny_dense, {"train": "masks"}, "--weights-optimizer cast: wanted --train weights, found --train masks"),
        (tiny_dense, {"weights_optimizer": "adam"}, "--mask-refresh-interval: wanted only with --weights-optimizer cast"),
        (
            tiny_dense,
            {"adam_eps": 1e-5, "l1_decay_coeff": 4e-7},
            "--adam-eps 1e-05: with --weights-optimizer cast wanted at most a tenth",
        ),
        (single, {"l1_decay_coeff": 0.02}, "start a new run from what `maskllm trim` makes of it"),
    ):
        words = arguments(tmp_path / "run", tiny_dataset, start, **OPTIONS | {"load": tmp_path / "none"} | more)
        assert train.main(words) == 1
        assert message in capfd.readouterr().err.strip().splitlines()[-1], more
