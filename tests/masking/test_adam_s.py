"""AdamS against a direct transcription of the paper's formulas, and weight scaling against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from maskllm.masking.adam_s import AdamS
from maskllm.masking.scaling import group_boundary, scaled

LR, BETA1, BETA2, EPS, DECAY, STEPS = 0.01, 0.9, 0.95, 1e-8, 0.05, 6


def group(*parameters: torch.Tensor) -> dict[str, object]:
    return {"params": list(parameters), "lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": 0.0}


def entry_by_entry(weights: list[float], gradients: list[list[float]], masks: list[list[bool]]) -> list[float]:
    """Algorithm 1 of arXiv 2509.25996, lines 10 to 21, one weight at a time."""
    mu, v = [0.0] * len(weights), [0.0] * len(weights)
    for t, (gradient, mask) in enumerate(zip(gradients, masks, strict=True)):
        alpha = t / STEPS
        for i, weight in enumerate(weights):
            mu[i] = BETA1 * mu[i] + (1 - BETA1) * gradient[i]
            sign = (weight > 0) - (weight < 0)
            tilde = mu[i] if mask[i] else (1 - alpha) * mu[i] + alpha * DECAY * sign
            v[i] = BETA2 * v[i] + (1 - BETA2) * tilde**2
            corrected = v[i] / (1 - BETA2 ** (t + 1))
            weights[i] = weight - LR * tilde / (1 - BETA1 ** (t + 1)) / (math.sqrt(corrected) + EPS)
    return weights


def test_a_step_is_the_papers_and_the_mask_may_change(monkeypatch):
    monkeypatch.setattr("maskllm.masking.adam_s.CHUNK", 5)
    torch.manual_seed(0)
    weight = torch.randn(4, 8, dtype=torch.float64)
    weight[0, 0] = 0.0
    gradients, masks = torch.randn(STEPS, 4, 8, dtype=torch.float64), torch.rand(STEPS, 4, 8) > 0.5
    expected = entry_by_entry(
        weight.flatten().tolist(), [one.flatten().tolist() for one in gradients], [one.flatten().tolist() for one in masks]
    )
    parameter = torch.nn.Parameter(weight.clone())
    now = 0
    adam = AdamS([group(parameter)], {parameter: lambda: masks[now]}, DECAY)
    for now, gradient in enumerate(gradients):
        adam.alpha = now / STEPS
        parameter.grad = gradient.clone()
        adam.step()
        assert torch.equal(parameter.grad, gradient)
    torch.testing.assert_close(parameter.detach().flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_parameters_without_a_mask_take_adamws_step():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.arange(6.0)) for _ in range(2))
    masked = torch.nn.Parameter(torch.ones(4))
    adams = AdamS([group(masked, ours) | {"weight_decay": 0.1}], {masked: lambda: torch.ones(4, dtype=torch.bool)}, DECAY)
    adamw = torch.optim.AdamW([group(theirs) | {"weight_decay": 0.1}])
    for _ in range(3):
        ours.grad = torch.randn(6)
        theirs.grad, masked.grad = ours.grad.clone(), torch.randn(4)
        adams.step()
        adamw.step()
    assert torch.equal(ours, theirs)


def test_the_decay_moves_a_weight_that_gets_no_gradient_by_the_learning_rate():
    """Adam's normalization makes it so, whatever the strength: docs/training-weights.md."""
    parameter = torch.nn.Parameter(torch.full((4,), 0.05))
    adam = AdamS([group(parameter)], {parameter: lambda: torch.tensor([True, True, False, False])}, 1e-6)
    adam.alpha = 1.0
    for _ in range(3):
        parameter.grad = torch.zeros(4)
        adam.step()
    assert parameter[:2].tolist() == pytest.approx([0.05] * 2)
    moved = 0.05 - parameter[2].item()
    assert moved + 1e-3 > 3 * LR and parameter[2] == parameter[3]


@pytest.mark.parametrize(("columns", "m", "expected"), [(576, 4, 288), (12, 4, 4), (4, 4, 0), (64, 32, 32)])
def test_a_group_of_columns_starts_at_a_block(columns, m, expected):
    assert group_boundary(columns, m) == expected


@pytest.mark.parametrize("boundary", [0, 4, 12])
def test_scaling_and_its_gradients_are_those_of_autograd(boundary):
    torch.manual_seed(0)
    weight = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    scales = torch.rand(3, 2, dtype=torch.float64).add_(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *factors: scaled(*factors, boundary), (weight, scales))
    expected = weight * torch.cat([scales[:, :1].expand(3, boundary), scales[:, 1:].expand(3, 12 - boundary)], 1)
    assert torch.equal(scaled(weight, scales, boundary), expected)


def test_a_scaled_bf16_weight_is_rounded_once():
    torch.manual_seed(0)
    weight, scales = torch.randn(5, 16).bfloat16().requires_grad_(), torch.rand(5, 2).requires_grad_()
    product = scaled(weight, scales, 8)
    assert torch.equal(product, (weight.float() * scales.repeat_interleave(8, 1)).bfloat16())
    grad = torch.randn(5, 16).bfloat16()
    product.backward(grad)
    expected = (grad.float() * weight.detach().float()).view(5, 2, 8).sum(-1)
    torch.testing.assert_close(scales.grad, expected)
    assert weight.grad.dtype == torch.bfloat16
