"""The objective of one masked linear against the paper's formulas, differentiated by autograd in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maskllm.masking.draw import Draw, open_draw
from maskllm.masking.parameter import Location, MaskedParameter
from maskllm.masking.sampler import MaskSampler
from maskllm.masking.schedules import AnnealingSchedule
from maskllm.megatron.loss import Losses
from maskllm.ops import NoiseKey, ShardMap, philox_key
from maskllm.ops.noise import gumbel
from maskllm.patterns import Pattern
from maskllm.training.objective import Objective

VOCABULARY, IN, SAMPLES = 5, 12, (6, 7)
SCALE, TEMPERATURE = 3.0, 0.8
STEP, STEPS, WEIGHT_REG = 3, 8, 0.3
LAMBDA = WEIGHT_REG * (1 - STEP / STEPS)
PATTERN = Pattern(2, 4)


@pytest.fixture
def parameter() -> MaskedParameter:
    generator = torch.Generator().manual_seed(0)
    owner = torch.nn.Module()
    owner.weight = torch.nn.Parameter(torch.randn(VOCABULARY, IN, generator=generator), requires_grad=False)
    parameter = MaskedParameter(owner, Location("layer", IN))
    parameter.attach_logits(MaskSampler(PATTERN, seed=1, scale=SCALE, temperature=TEMPERATURE, stats=torch.zeros(2)))
    with torch.no_grad():
        parameter.logits.copy_(torch.randn(parameter.logits.shape, generator=generator))
    return parameter


@pytest.fixture
def objective(parameter) -> Objective:
    objective = Objective(AnnealingSchedule(STEPS, weight_reg=WEIGHT_REG), parameter.sampler, 1.0, None)
    objective.set_step(STEP, num_microbatches=len(SAMPLES))
    return objective


def batch(sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [2 sequences, 4 tokens, IN] and labels [2, 4]."""
    generator = torch.Generator().manual_seed(sample)
    return torch.randn(2, 4, IN, generator=generator), torch.randint(VOCABULARY, (2, 4), generator=generator)


def cross_entropies(weight: torch.Tensor, sample: int) -> torch.Tensor:
    inputs, labels = batch(sample)
    outputs = inputs.to(weight.dtype) @ weight.t()
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").view(2, 4)


def losses(token_losses: torch.Tensor) -> Losses:
    return Losses(token_losses.mean(), token_losses.detach(), torch.zeros_like(token_losses))


def masked_weight(parameter: MaskedParameter, logits: torch.Tensor, sample: int) -> torch.Tensor:
    """W * m by MaskLLM's equations: m = softmax((kappa * l + g) / tau) @ S."""
    key = NoiseKey(philox_key(1, "layer"), sample, ShardMap(IN // 4))
    noise = gumbel(key, VOCABULARY, IN // 4, 6, torch.float64, "cpu")
    mask = torch.softmax((SCALE * logits + noise) / TEMPERATURE, -1) @ PATTERN.candidates(device="cpu").double()
    return parameter.weight.double() * mask.view(VOCABULARY, IN)


def test_the_gradient_is_that_of_cross_entropy_minus_the_regularizer(parameter, objective):
    for sample in SAMPLES:
        with open_draw(Draw(sample)), parameter.weight_for_product() as weight:
            loss, _ = objective.micro_batch(losses(cross_entropies(weight, sample)))
        (loss / len(SAMPLES)).backward()  # Megatron's schedules divide

    logits = parameter.logits.detach().double().requires_grad_()
    total = 0.0
    for sample in SAMPLES:
        weight = masked_weight(parameter, logits, sample)
        total = total + (cross_entropies(weight, sample).mean() - LAMBDA * weight.square().sum()) / len(SAMPLES)
    total.backward()
    torch.testing.assert_close(parameter.logits.grad.double(), logits.grad, rtol=1e-4, atol=1e-6)


def test_the_reported_regularizer_is_a_mean_over_draws_and_steps(parameter, objective):
    squares = []
    for sample in SAMPLES:
        with open_draw(Draw(sample)):
            parameter.effective_weight()
        squares.append(masked_weight(parameter, parameter.logits.detach().double(), sample).square().sum().item())
    found = float(parameter.sampler.stats[0])
    first = LAMBDA * sum(squares) / len(SAMPLES)
    assert objective.regularizer([STEP], [found], len(SAMPLES)) == pytest.approx(first, rel=1e-5)
    last = WEIGHT_REG * (1 - 7 / STEPS) * 10 / len(SAMPLES)
    assert objective.regularizer([STEP, 7], [found, 10.0], len(SAMPLES)) == pytest.approx((first + last) / 2, rel=1e-5)


def test_the_report_keeps_the_cross_entropy_when_the_loss_is_divided_in_place(parameter, objective):
    token_losses = cross_entropies(parameter.weight, 1)
    loss, report = objective.micro_batch(losses(token_losses))
    loss /= 4
    assert report.cross_entropy == token_losses.mean()


def test_the_cross_entropy_is_weighted(parameter):
    objective = Objective(AnnealingSchedule(STEPS), parameter.sampler, 0.25, None)
    loss, report = objective.micro_batch(losses(cross_entropies(parameter.weight, 1)))
    assert loss == 0.25 * report.cross_entropy
