"""What is minimized: the loss of a micro-batch, term by term (MaskLLM, arXiv 2409.17481, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from maskllm.masking.sampler import MaskSampler
from maskllm.masking.schedules import AnnealingSchedule
from maskllm.megatron.distillation import StudentAndTeacher
from maskllm.megatron.loss import Losses


class Report(NamedTuple):
    """Of a micro-batch, on the last pipeline stage: means over its tokens, fp32 scalars."""

    cross_entropy: torch.Tensor
    kl: torch.Tensor


class Objective:
    """Cross-entropy and what a teacher adds to it, minus the sparse weight regularization, lambda_t * sum over masked layers of
    ||W * m||^2.

    The model computes the first two (`maskllm.megatron.loss`, `maskllm.megatron.distillation`). The regularization needs no tensor of
    its own: the backward pass of the masked weight (`maskllm.ops.masked_weight`) adds its gradient, and the draws add up its value in
    `MaskSampler.stats`.
    """

    def __init__(
        self, schedule: AnnealingSchedule, sampler: MaskSampler, ce_loss_coeff: float, pair: StudentAndTeacher | None
    ) -> None:
        """`ce_loss_coeff` is the weight of the cross-entropy without a teacher; with one, `pair` weighs the terms."""
        self.schedule = schedule
        self.sampler = sampler
        self.coefficient = ce_loss_coeff if pair is None else 1.0
        self.pair = pair
        self.teacher_terms: list[str] = []
        """The terms of the loss that compare with the teacher, as metrics name them: "kl", "squarehead"."""
        if pair is not None:
            weights = {"kl": pair.terms.kl, "squarehead": pair.squarehead}
            self.teacher_terms = [name for name, weight in weights.items() if weight]

    def set_step(self, iteration: int, num_microbatches: int) -> None:
        """Weigh the terms as in step `iteration`, counted from 0. Its loss is the mean of `num_microbatches` on each data-parallel rank."""
        self.sampler.weight_reg = self.schedule.weight_reg_at(iteration) / num_microbatches
        if self.pair is not None:
            self.pair.micro_batches = num_microbatches

    def micro_batch(self, losses: Losses) -> tuple[torch.Tensor, Report]:
        """The loss of a micro-batch and what to report of it, as Megatron's schedules take them."""
        loss = losses.mean if self.coefficient == 1 else self.coefficient * losses.mean
        return loss, Report(losses.cross_entropy.mean(), losses.kl.mean())

    def regularizer(self, iterations: Sequence[int], squares: Sequence[float], draws: int) -> float:
        """The mean regularization of some steps: lambda_t times the sum of ||W * m||^2 over the layers, a mean over the draws of a step.

        Args:
            iterations: the steps, counted from 0.
            squares: of each step the sum of ||W * m||^2 over all layers and draws.
            draws: draws of all masks in a step.
        """
        values = [self.schedule.weight_reg_at(step) * square / draws for step, square in zip(iterations, squares, strict=True)]
        return sum(values) / len(values)
