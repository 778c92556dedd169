"""KL and SquareHead, against their formulas in plain torch and fp64 gradients."""

from __future__ import annotations

import pytest
import torch

from maskllm.masking import distillation
from maskllm.masking.distillation import divergence, squarehead


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1 << 25, 40])
def test_the_divergence_and_its_gradient(temperature, chunk, monkeypatch):
    monkeypatch.setattr(distillation, "MAX_CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(0)
    logits, target = (4 * torch.randn(7, 20, generator=generator) for _ in range(2))
    logits.requires_grad_()
    found = divergence(logits, target, temperature)
    p, q = (torch.log_softmax(each.double() / temperature, -1) for each in (logits, target))
    expected = temperature**2 * (q.exp() * (q - p)).sum(-1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    weights = torch.rand(7, generator=generator)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    (exact,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(gradient, exact.float(), rtol=1e-5, atol=1e-6)


def test_a_teacher_without_a_gradient_costs_none():
    logits = torch.randn(3, 5)
    assert not divergence(logits, logits.clone(), 1.0).requires_grad
    torch.testing.assert_close(divergence(logits, logits.clone(), 1.0), torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_squarehead_and_its_gradient(padded, dtype):
    generator = torch.Generator().manual_seed(1)
    hidden, target = (torch.randn(2, 6, 8, generator=generator).to(dtype) for _ in range(2))
    counted = torch.ones(2, 6, dtype=torch.bool)
    if padded:
        counted[1, 3:] = False
        hidden[1, 4], target[1, 5] = float("nan"), float("inf")  # what is computed of padding does not matter
    hidden.requires_grad_()
    found = squarehead(hidden, target, counted if padded else None)
    ours, theirs = (each[counted].double() for each in (hidden, target))
    expected = (ours - theirs).square().sum() / theirs.square().sum()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(3 * found, hidden)
    (exact,) = torch.autograd.grad(3 * expected, hidden)
    torch.testing.assert_close(gradient, exact.nan_to_num(), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)
    assert gradient[~counted].eq(0).all()
