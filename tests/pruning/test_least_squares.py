"""Least-squares weights: the normal equations of each row, every method, and checkpoints that hold them."""

import copy
import json

import pytest
import torch

from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.huggingface.weights_hash import read_hash
from maskllm.patterns import Pattern
from maskllm.pruning import PruneSettings, prune_hf
from maskllm.pruning.least_squares import least_squares
from maskllm.pruning.solve import prune_matrices
from maskllm.pruning.sparsegpt import factor_hessian, sparsegpt
from maskllm.pruning.statistics import InputStatistics
from tests.pruning.pruned import assert_same, calibrated, hf_masks, hf_weights, prune
from tests.pruning.test_huggingface import PATTERN, tiny_llama, tokens
from tests.pruning.test_sparsegpt import correlated_inputs, damped, problem


def normal_equations(weight, hessian, mask):
    """Each row by itself: with the kept inputs K, sparse_K = (H_KK)^-1 (H weight)_K."""
    sparse = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(mask):
        right = (hessian @ weight[row].double())[kept]
        sparse[row, kept] = torch.linalg.solve(hessian[kept][:, kept], right)
    return sparse


@pytest.mark.parametrize("start", ["dense", "sparsegpt"])
@pytest.mark.parametrize("sparsity", [Pattern(2, 4), Pattern(1, 8), 0.5])
def test_each_row_solves_its_normal_equations(sparsity, start):
    weight, hessian = problem(40, 96, seed=2)
    mask, updated = sparsegpt(weight, factor_hessian(hessian.clone(), "layer"), sparsity)
    hessian = damped(hessian)
    found = least_squares(weight, hessian.float(), mask, weight if start == "dense" else updated, "layer")
    torch.testing.assert_close(found.double(), normal_equations(weight, hessian, mask), rtol=1e-3, atol=1e-3)
    assert (found[~mask] == 0).all()


def test_rows_that_need_nothing_stay_finite():
    """A row of zeros, a row that keeps nothing, and a row that keeps all its weights, beside rows that take many steps."""
    weight, hessian = problem(8, 64, seed=4)
    mask = (torch.arange(64) % 4 < 2).repeat(8, 1)
    mask[1], mask[2], weight[0] = False, True, 0
    found = least_squares(weight, damped(hessian).float(), mask, weight, "layer")
    assert (found[:2] == 0).all()
    assert torch.equal(found[2], weight[2])
    torch.testing.assert_close(found.double(), normal_equations(weight, damped(hessian), mask), rtol=1e-3, atol=1e-3)


def test_more_rows_than_are_solved_at_a_time(monkeypatch):
    weight, hessian = problem(10, 32, seed=8)
    mask = (torch.arange(32) % 4 < 2).repeat(10, 1)
    hessian = damped(hessian).float()
    whole = least_squares(weight, hessian, mask, weight, "layer")
    monkeypatch.setattr("maskllm.pruning.least_squares._ROWS", 4)
    torch.testing.assert_close(least_squares(weight, hessian, mask, weight, "layer"), whole, rtol=1e-4, atol=1e-4)


def test_rows_without_a_solution_are_reported(monkeypatch, caplog):
    weight, hessian = problem(10, 32, seed=8)
    mask = (torch.arange(32) % 4 < 2).repeat(10, 1)
    monkeypatch.setattr("maskllm.pruning.least_squares._MAX_STEPS", 1)
    found = least_squares(weight, damped(hessian).float(), mask, weight, "model.layers.0.mlp.up_proj")
    assert found.isfinite().all()
    assert "model.layers.0.mlp.up_proj: least squares left 10 of 10 rows after 1 steps" in caplog.text


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e10])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_inputs_scale_has_no_effect_and_weights_of_dead_inputs_stay(method, scale):
    weight, _ = problem(6, 32, seed=9)
    inputs = correlated_inputs(128, 32, seed=9)
    inputs[:, 5] = 0
    statistics = InputStatistics(32, torch.device("cpu"))
    statistics.add(inputs * scale)
    solved = prune_matrices({"layer": weight}, statistics, PruneSettings(method, PATTERN, least_squares=True))["layer"]
    hessian = damped(inputs.T @ inputs)
    torch.testing.assert_close(solved.weight.double(), normal_equations(weight, hessian, solved.mask), rtol=2e-3, atol=2e-3)
    assert torch.equal(solved.weight[:, 5], weight[:, 5] * solved.mask[:, 5])


def test_a_new_weight_that_its_dtype_cannot_hold_is_refused():
    weight = torch.full((1, 4), 6e4, dtype=torch.float16)
    statistics = InputStatistics(4, torch.device("cpu"))
    statistics.add(torch.ones(8, 4))
    with pytest.raises(MaskLLMError, match=r"layer: a new weight is too large for torch.float16"):
        prune_matrices({"layer": weight}, statistics, PruneSettings("magnitude", PATTERN, least_squares=True))


def test_few_tokens_and_a_large_input_do_not_break_it():
    """A Hessian of rank 5 with one input a thousand times as large: like the calibration of a transformer by a short text."""
    weight, _ = problem(8, 64, seed=6)
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    inputs[:, 7] *= 1000
    hessian = damped(inputs.T @ inputs)
    hessian /= hessian.diagonal().mean()
    mask = torch.arange(64) % 4 < 2
    mask = mask.expand(8, -1)
    found = least_squares(weight, hessian.float(), mask, weight, "layer")
    errors = [
        ((w.double() - weight) @ hessian * (w.double() - weight)).sum() for w in (found, normal_equations(weight, hessian, mask))
    ]
    assert errors[0] <= 1.001 * errors[1]


@pytest.mark.parametrize("sparsity", [PATTERN, 0.5])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_methods_mask_stays_and_its_outputs_come_closer(method, sparsity):
    dense = tiny_llama(2)
    plain = prune_hf(copy.deepcopy(dense), tokens(), PruneSettings(method, sparsity))
    model = copy.deepcopy(dense)
    fitted = prune_hf(model, tokens(), PruneSettings(method, sparsity, least_squares=True))
    first = {name: matrix["relative_error"] for name, matrix in fitted.report["layers"][0]["matrices"].items()}
    others = [plain]
    if method == "sparsegpt":
        others.append(prune_hf(copy.deepcopy(dense), tokens(), PruneSettings(method, sparsity, update_weights=True)))
    for other in others:
        for name, matrix in other.report["layers"][0]["matrices"].items():
            assert torch.equal(other.masks[f"{name}.weight"], fitted.masks[f"{name}.weight"])
            assert first[name] < matrix["relative_error"]
    for name, mask in fitted.unpacked(model).items():
        assert (model.get_parameter(name)[~mask] == 0).all()


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def fitted(tiny_dense, tiny_dataset, tmp_path_factory):
    """`tiny_dense` with Wanda's mask, fitted by least squares."""
    path = tmp_path_factory.mktemp("fitted") / "out"
    assert prune(tiny_dense, path, *calibrated(tiny_dataset, "wanda", "--least-squares")) == 0
    return path


def test_a_checkpoint_and_its_export_say_that_the_weights_were_fitted(fitted, tiny_dense, tmp_path):
    masks, weights, dense = hf_masks(fitted), hf_weights(fitted), hf_weights(tiny_dense)
    for name, mask in masks.items():
        assert weights[name].dtype == torch.bfloat16
        assert (weights[name][~mask] == 0).all()
        assert (weights[name][mask] != dense[name][mask]).float().mean() > 0.5
    details = resolve(fitted).info.details
    assert (details["update_weights"], details["least_squares"]) == (True, True)
    assert run("trim", "--load", fitted, "--output", tmp_path / "trimmed") == 0
    assert run("export", "--load", tmp_path / "trimmed", "--output", tmp_path / "hf") == 0
    assert read_hash(tmp_path / "hf").kept_weights == "fitted by least squares"


def test_a_mask_file_is_fitted_too(fitted, tiny_dense, tiny_dataset, tmp_path):
    """The same masks and the same calibration give the same weights as the method that chose the masks."""
    file = tmp_path / "masks.npz"
    assert run("trim", "--load", fitted, "--output", tmp_path / "trimmed") == 0
    assert run("export", "--load", tmp_path / "trimmed", "--output", tmp_path / "hf", "--mask-file", file) == 0
    options = calibrated(tiny_dataset, "mask-file", "--mask", file, "--least-squares")
    assert prune(tiny_dense, tmp_path / "again", *options) == 0
    assert_same(fitted, tmp_path / "again")


def test_a_killed_run_continues_to_the_same_weights(fitted, tiny_dense, tiny_dataset, tmp_path, ranks):
    options = calibrated(tiny_dataset, "wanda", "--least-squares", "--json", tmp_path / "report.json")
    command = ["prune", "--load", tiny_dense, "--output", tmp_path / "out", *options]
    assert ranks(1, "tests.pruning.killed_worker", *command, check=False).returncode != 0
    assert not (tmp_path / "out").exists()
    assert prune(tiny_dense, tmp_path / "out", *options) == 0
    layers = json.loads((tmp_path / "report.json").read_text())["layers"]
    assert [layer["resumed"] for layer in layers] == [True, False, False, False]
    assert_same(fitted, tmp_path / "out")


def test_options_that_do_not_go_together_are_refused(tiny_dense, tiny_dataset, tmp_path, capsys):
    assert prune(tiny_dense, tmp_path / "out", "--method", "magnitude", "--least-squares") == 1
    assert "--least-squares needs --calibration-data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prune(tiny_dense, tmp_path / "out", *calibrated(tiny_dataset, "sparsegpt", "--least-squares", "--update-weights"))
    assert "not allowed with argument" in capsys.readouterr().err
    with pytest.raises(MaskLLMError, match="wanted one of them"):
        PruneSettings(update_weights=True, least_squares=True)
