"""SparseGPT against closed forms and against a direct implementation of the paper's algorithm 1."""

import logging

import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.patterns import Pattern
from maskllm.pruning.sparsegpt import BLOCK_SIZE, DAMPING, factor_hessian, sparsegpt


def correlated_inputs(tokens, features, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(features) + torch.randn(features, features, generator=generator) / features**0.5
    return torch.randn(tokens, features, generator=generator) @ mix * (0.2 + torch.rand(features, generator=generator))


def problem(rows, features, seed, tokens=None):
    weight = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed + 1000))
    inputs = correlated_inputs(tokens or 4 * features, features, seed)
    return weight, 2 * inputs.T @ inputs


def damped(hessian):
    hessian = hessian.double()
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def algorithm_1(weight, hessian, sparsity):
    """The paper's algorithm 1 in fp64, one column at a time; the inverse is recomputed for every column.

    With the columns before j fixed, H_F^-1 is the inverse of the remaining damped Hessian. Its first row gives the update.
    """
    weight, hessian = weight.double().clone(), damped(hessian)
    rows, columns = weight.shape
    step = sparsity.m if isinstance(sparsity, Pattern) else BLOCK_SIZE
    keep = torch.ones(rows, columns, dtype=torch.bool)
    diagonal = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(columns)])
    for j in range(columns):
        if j % step == 0:
            scores = weight[:, j : j + step] ** 2 / diagonal[j : j + step]
            if isinstance(sparsity, Pattern):
                for row in range(rows):
                    keep[row, j + scores[row].argsort()[: sparsity.m - sparsity.n]] = False
            else:
                flat = torch.ones(scores.numel(), dtype=torch.bool)
                flat[scores.flatten().argsort()[: int(scores.numel() * sparsity)]] = False
                keep[:, j : j + step] = flat.view_as(scores)
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = torch.where(keep[:, j], 0, weight[:, j]) / inverse[0, 0]
        weight[:, j:] -= error.outer(inverse[0])
    return keep, weight * keep


@pytest.mark.parametrize("sparsity", [Pattern(2, 4), Pattern(4, 8), Pattern(16, 32), Pattern(1, 3), Pattern(7, 12), 0.5, 0.3])
def test_the_result_is_that_of_the_papers_algorithm(sparsity):
    weight, hessian = problem(6, 180 if sparsity in (Pattern(1, 3), Pattern(7, 12)) else 160, seed=0)
    expected_mask, expected_weight = algorithm_1(weight, hessian, sparsity)
    mask, updated = sparsegpt(weight, factor_hessian(hessian.clone(), "layer"), sparsity)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(updated.double(), expected_weight, rtol=2e-3, atol=2e-4)


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse():
    _, hessian = problem(1, 24, seed=3)
    factor = factor_hessian(hessian.clone(), "layer")
    expected = torch.linalg.cholesky(torch.linalg.inv(damped(hessian)), upper=True)
    torch.testing.assert_close(factor.upper.double(), expected, rtol=1e-3, atol=1e-5)
    assert factor.damping == DAMPING


@pytest.mark.parametrize("gone", range(6))
def test_one_removed_weight_is_the_optimal_brain_surgeons(gone):
    """Removing w_p changes the other weights by -w_p / [H^-1]_pp * [H^-1]_:p, where H covers the columns from p on."""
    features = 6
    weight, hessian = problem(4, features, seed=5)
    weight = weight.sign() * (weight.abs() + 1)
    weight[:, gone] *= 1e-3  # small enough to be the one that is removed
    mask, updated = sparsegpt(weight, factor_hessian(hessian.clone(), "layer"), Pattern(features - 1, features))
    assert mask.tolist() == [[column != gone for column in range(features)]] * 4
    inverse = torch.linalg.inv(damped(hessian)[gone:, gone:])
    expected = weight.double().clone()
    expected[:, gone:] -= (weight[:, gone].double() / inverse[0, 0]).outer(inverse[0])
    torch.testing.assert_close(updated.double(), expected * mask, rtol=1e-4, atol=1e-6)


def test_the_first_removed_weight_has_the_least_squares_solution():
    """If the first column is removed, the update is the ridge regression on all the other columns."""
    weight, hessian = problem(3, 4, seed=8)
    weight[:, 0] *= 1e-2
    mask, updated = sparsegpt(weight, factor_hessian(hessian.clone(), "layer"), Pattern(3, 4))
    assert not mask[:, 0].any()
    target = damped(hessian)
    # Minimize (w - v)^T H (w - v) over v with v_0 = 0.
    expected = torch.linalg.solve(target[1:, 1:], target[1:] @ weight.double().T).T
    torch.testing.assert_close(updated[:, 1:].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparsity", [Pattern(2, 4), Pattern(4, 8), 0.5])
@pytest.mark.parametrize("seed", range(8))
def test_the_update_has_a_smaller_error_than_the_mask_alone(sparsity, seed):
    weight, hessian = problem(16, 192, seed, tokens=300)
    mask, updated = sparsegpt(weight, factor_hessian(hessian.clone(), "layer"), sparsity)

    def output_error(other):
        change = (weight - other).double()
        return (change @ hessian.double() * change).sum(1)

    assert (output_error(updated) < output_error(weight * mask)).all()


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "16:32", "3:7", "31:32"])
def test_keeps_exactly_n_of_every_m(text):
    pattern = Pattern.parse(text)
    weight, hessian = problem(7, 9 * pattern.m, seed=2)
    weight = weight.round()  # many equal weights, many zeros
    mask, updated = sparsegpt(weight, factor_hessian(hessian, "layer"), pattern)
    assert (mask.view(7, -1, pattern.m).sum(-1) == pattern.n).all()
    assert (updated[~mask] == 0).all()


def test_weights_of_dead_inputs_are_removed_and_change_no_other():
    weight, hessian = problem(8, 32, seed=4)
    alive = [j for j in range(32) if j not in (3, 17)]
    hessian[[3, 17]] = 0
    hessian[:, [3, 17]] = 0
    mask, updated = sparsegpt(weight, factor_hessian(hessian.clone(), "layer"), Pattern(2, 4))
    assert not mask[:, [3, 17]].any()
    assert (updated[:, [3, 17]] == 0).all()
    weight[:, [3, 17]] = 77.0  # their values have no effect
    again = sparsegpt(weight, factor_hessian(hessian.clone(), "layer"), Pattern(2, 4))
    assert torch.equal(mask, again[0])
    assert torch.equal(updated[:, alive], again[1][:, alive])


def test_a_rank_deficient_hessian_is_damped_more_and_reported(caplog):
    inputs = correlated_inputs(3, 256, seed=6) * 1e3
    hessian = 2 * inputs.T @ inputs
    with caplog.at_level(logging.WARNING):
        factor = factor_hessian(hessian.clone(), "decoder.layers.7.mlp.linear_fc2", damping=1e-9)
    assert factor.damping > 1e-9
    assert "decoder.layers.7.mlp.linear_fc2" in caplog.text and f"{factor.damping:g}" in caplog.text
    assert sparsegpt(torch.randn(4, 256), factor, Pattern(2, 4))[1].isfinite().all()


def test_the_factor_is_that_of_the_damped_hessian():
    inputs = correlated_inputs(3, 256, seed=6) * 1e3
    hessian = 2 * inputs.T @ inputs
    factor = factor_hessian(hessian.clone(), "layer")
    target = hessian.double() + factor.damping * hessian.double().diagonal().mean() * torch.eye(256, dtype=torch.float64)
    product = factor.upper.double() @ target @ factor.upper.double().T
    assert (product - torch.eye(256)).abs().max() < 0.02  # fp32, at a condition number of 26000


def test_constant_inputs_are_solved():
    """An input that is the same for every token adds a large rank-one part. The default damping is enough for it."""
    inputs = correlated_inputs(512, 64, seed=9)
    inputs[:, 5] = 300.0
    inputs[:, 6] = 300.0  # and a copy of it
    hessian = 2 * inputs.T @ inputs
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    mask, updated = sparsegpt(weight, factor_hessian(hessian.clone(), "layer"), Pattern(2, 4))
    change = (weight - updated).double()
    plain = (weight - weight * mask).double()
    assert (change @ hessian.double() * change).sum() < (plain @ hessian.double() * plain).sum()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_damaged_statistics_are_refused_by_name(value):
    hessian = torch.eye(8)
    hessian[2, 2] = value
    with pytest.raises(MaskLLMError, match=r"layers\.3"):
        factor_hessian(hessian, "layers.3")


def test_pattern_must_divide_the_inputs():
    with pytest.raises(MaskLLMError, match="not a multiple of 8"):
        sparsegpt(torch.randn(2, 12), factor_hessian(torch.eye(12), "layer"), Pattern(4, 8))
