"""Calibrated rounding against a direct implementation of the sweep, and against brute force."""

import pytest
import torch

from maskllm.ops.sparse_linear import Layout
from maskllm.patterns import Pattern
from maskllm.pruning.magnitude import magnitude_mask
from maskllm.pruning.quantize import group_scales, quantize_matrices, sweep
from maskllm.pruning.solve import output_norm
from maskllm.pruning.sparsegpt import factor_hessian
from maskllm.pruning.statistics import InputStatistics
from tests.pruning.test_sparsegpt import correlated_inputs, damped, problem

LEVELS = {8: 127, 4: 7}
PATTERN = Pattern(2, 4)


def sparse_problem(rows, features, seed, sparsity=PATTERN):
    weight, hessian = problem(rows, features, seed)
    return weight * magnitude_mask(weight, sparsity), hessian


def direct_sweep(weight, hessian, grid, largest):
    """The sweep in fp64, one column at a time: with the columns before j fixed, the inverse of the rest of the damped Hessian."""
    kept, weight, hessian = weight != 0, weight.double().clone(), damped(hessian)
    result = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        scale = grid[:, j].double()
        rounded = (weight[:, j] / scale).round().clamp(-largest, largest) * scale
        result[:, j] = torch.where(kept[:, j], rounded, 0)
        inverse = torch.linalg.inv(hessian[j:, j:])
        weight[:, j:] -= ((weight[:, j] - result[:, j]) / inverse[0, 0]).outer(inverse[0])
    return result


@pytest.mark.parametrize("sparsity", [PATTERN, Pattern(1, 4), 0.6])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (4, 64), (4, -1)])
def test_the_sweep_is_that_of_the_paper(bits, group_size, sparsity):
    weight, hessian = sparse_problem(6, 176, 0, sparsity)
    scales = group_scales(weight, hessian.diagonal(), bits, group_size)
    grid = scales.repeat_interleave(176 if group_size == -1 else group_size, 1)[:, :176]
    found = sweep(weight, factor_hessian(hessian.clone(), "layer"), grid, LEVELS[bits])
    expected = direct_sweep(weight, hessian, grid, LEVELS[bits])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    assert (found[weight == 0] == 0).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("seed", range(4))
def test_outputs_change_less_than_with_rounding_to_the_nearest(bits, seed):
    weight, _ = sparse_problem(16, 192, seed)
    inputs = correlated_inputs(300, 192, seed)
    statistics = InputStatistics(192)
    statistics.add(inputs)
    layout = Layout(PATTERN, bits, 64)
    found = quantize_matrices({"layer": weight}, statistics, {"layer": layout})["layer"]
    scales = (weight.abs().unflatten(1, (-1, 64)).amax(-1) / LEVELS[bits]).repeat_interleave(64, 1)
    nearest = (weight / scales).round() * scales
    exact = inputs @ weight.T
    errors = [((inputs @ other.T - exact).norm() / exact.norm()).item() for other in (found.weight, nearest)]
    assert found.report == pytest.approx({"relative_error": errors[0], "nearest_error": errors[1]}, rel=1e-3)
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("group_size", [8, 12, -1])
def test_scales_have_the_least_weighted_error_of_those_tried(group_size):
    weight, hessian = sparse_problem(5, 28, 3)
    weight[2, :8] = 0
    importance = hessian.diagonal()
    found = group_scales(weight, importance, 4, group_size)
    for row in range(5):
        for group, columns in enumerate(weight[row].split(28 if group_size == -1 else group_size)):
            start = group * group_size
            largest = columns.abs().max() / 7
            if largest == 0:
                assert found[row, group] == 1
                continue
            errors = {}
            for share in torch.linspace(1, 0.5, 26).tolist():
                scale = largest * share
                change = columns - (columns / scale).round().clamp(-7, 7) * scale
                errors[scale.item()] = (change.square() * importance[start : start + len(columns)]).sum().item()
            assert errors[found[row, group].item()] == pytest.approx(min(errors.values()), rel=1e-5)


def test_the_columns_with_the_largest_inputs_come_first():
    weight, _ = sparse_problem(4, 48, 7)
    statistics = InputStatistics(48)
    statistics.add(correlated_inputs(200, 48, 7))
    hessian = statistics.hessian()
    order = hessian.diagonal().argsort(descending=True)
    found = quantize_matrices({"layer": weight}, statistics, {"layer": Layout(PATTERN, 4, 16)})["layer"]
    grid = found.scales.repeat_interleave(16, 1)
    expected = direct_sweep(weight[:, order], hessian[order][:, order], grid[:, order], 7)
    torch.testing.assert_close(found.weight[:, order].double(), expected, rtol=1e-6, atol=1e-7)


def test_matrices_with_the_same_inputs_are_rounded_as_alone():
    first, _ = sparse_problem(8, 64, 1)
    second, _ = sparse_problem(4, 64, 2)
    layouts = {"first": Layout(PATTERN, 4, 16), "second": Layout(None, 8)}

    def solve(weights):
        statistics = InputStatistics(64)
        statistics.add(correlated_inputs(100, 64, 5))
        return quantize_matrices(weights, statistics, layouts)

    together = solve({"first": first, "second": second.bfloat16()})
    for name, weight in (("first", first), ("second", second.bfloat16())):
        alone = solve({name: weight})[name]
        assert torch.equal(together[name].weight, alone.weight) and torch.equal(together[name].scales, alone.scales)
        assert ((alone.weight != 0) <= (weight != 0)).all()


def test_inputs_that_are_always_zero():
    weight, _ = sparse_problem(8, 64, 1)
    inputs = correlated_inputs(100, 64, 5)
    inputs[:, 8:30] = 0
    statistics = InputStatistics(64)
    statistics.add(inputs)
    found = quantize_matrices({"layer": weight}, statistics, {"layer": Layout(PATTERN, 4, 16)})["layer"]
    assert found.weight.isfinite().all()
    assert output_norm(weight - found.weight, statistics.hessian()) > 0
    nothing = quantize_matrices({"layer": weight}, InputStatistics(64), {"layer": Layout(PATTERN, 4, 16)})["layer"]
    assert nothing.weight.isfinite().all()
