"""What is minimized: the loss of a micro-batch, term by term (MaskLLM, arXiv 2409.17481, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from maskllm.masking.sampler import MaskSampler
from maskllm.masking.schedules import AnnealingSchedule

CROSS_ENTROPY = "lm loss"
"""The key of the cross-entropy in what Megatron's pipeline schedules report for a micro-batch."""


class Objective:
    """Cross-entropy minus the sparse weight regularization, lambda_t * sum over masked layers of ||W * m||^2.

    The regularization needs no tensor of its own: the backward pass of the masked weight (`maskllm.ops.masked_weight`) adds its gradient,
    and the draws add up its value in `MaskSampler.stats`.
    """

    def __init__(self, schedule: AnnealingSchedule, sampler: MaskSampler) -> None:
        self.schedule = schedule
        self.sampler = sampler

    def set_step(self, iteration: int, num_microbatches: int) -> None:
        """Weigh the terms as in step `iteration`, counted from 0. Its loss is the mean of `num_microbatches` on each data-parallel rank."""
        self.sampler.weight_reg = self.schedule.weight_reg_at(iteration) / num_microbatches

    def micro_batch(self, token_losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a micro-batch and what to report of it, as Megatron's schedules take them.

        Args:
            token_losses: cross-entropies, fp32 [micro batch, sequence].
        """
        loss = token_losses.mean()
        # The report is a copy, because upstream divides the loss by the number of micro-batches in place.
        return loss, {CROSS_ENTROPY: loss.detach().clone()}

    def regularizer(self, iterations: Sequence[int], squares: Sequence[float], draws: int) -> float:
        """The mean regularization of some steps: lambda_t times the sum of ||W * m||^2 over the layers, a mean over the draws of a step.

        Args:
            iterations: the steps, counted from 0.
            squares: of each step the sum of ||W * m||^2 over all layers and draws.
            draws: draws of all masks in a step.
        """
        values = [self.schedule.weight_reg_at(step) * square / draws for step, square in zip(iterations, squares, strict=True)]
        return sum(values) / len(values)
