"""One optimizer step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from maskllm.distributed import device
from maskllm.masking.sampler import MaskSampler
from maskllm.training.arguments import TrainArguments
from maskllm.training.cast import Cast
from maskllm.training.data import Batches
from maskllm.training.micro_batches import MicroBatches
from maskllm.training.optimizer import clip_and_step
from maskllm.training.surviving.stopping import Stopping
from maskllm.training.trainables import MASK_LOGITS, ParameterGroup


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for the metrics."""

    iteration: int
    """Which step it was, counted from 0."""
    sums: torch.Tensor
    """This rank's fp32 result of `MicroBatches.run`, sum of squares of masked weights and sum of maximum probabilities."""
    grad_norms: list[float]
    """As `clip_and_step` returns them; empty if the step was skipped."""
    learning_rates: dict[str, float]
    """By the name of the group of parameters (`ParameterGroup.name`)."""
    skipped: bool = False
    """Whether the loss or a gradient was not finite on some rank, so that no rank updated anything."""


@dataclass
class Step:
    """Draws or refreshes the masks, runs the micro-batches forward and backward, and updates what is trained."""

    arguments: TrainArguments
    model: DistributedDataParallel
    sampler: MaskSampler
    micro_batches: MicroBatches
    batches: Batches
    groups: Sequence[ParameterGroup]
    optimizer: MegatronOptimizer
    lr_scheduler: OptimizerParamScheduler
    stopping: Stopping
    cast: Cast | None

    def __call__(self, iteration: int) -> StepResult:
        """Do step `iteration`, counted from 0.

        If the loss or a gradient is not finite on any rank, all ranks leave parameters and optimizer as they are.
        """
        sampler, objective = self.sampler, self.micro_batches.objective
        sampler.temperature = objective.schedule.temperature(iteration)
        sampler.scale = objective.schedule.scale(iteration)
        sampler.stats = torch.zeros(2, dtype=torch.float32, device=device())
        objective.set_step(iteration, self.micro_batches.count)
        if self.cast is not None:
            self.cast.start_step(iteration)
        learning_rates = self._set_learning_rates(iteration)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        first = iteration * self.micro_batches.per_step
        one_draw = self.arguments.mask_sample_interval == "step"
        losses = self.micro_batches.run(
            self.batches, first, sample_of=lambda index: iteration if one_draw else first + index, forward_only=False
        )
        sums = torch.cat([losses, sampler.stats])
        problem = self._not_finite(sums)
        if problem is not None:
            print(f"iteration {iteration + 1}: {problem}", file=sys.stderr, flush=True)
        skipped = self.stopping.agree_after_step(iteration, skip=problem is not None)
        # Megatron's optimizers look for gradients that are not finite only if they scale the loss, which fp16 weights need.
        grad_norms = [] if skipped else clip_and_step(self.optimizer, self.groups)
        self.lr_scheduler.step(increment=self.arguments.global_batch_size)
        return StepResult(iteration, sums, grad_norms, learning_rates, skipped)

    def _set_learning_rates(self, iteration: int) -> dict[str, float]:
        """Hold the weights still before `--weights-start-iter`; returns each group's learning rate.

        Weights that have no gradients and a rate of 0 keep their bits and their optimizer's moments of 0.
        """
        moves = iteration >= self.arguments.weights_start_iter
        rates = {}
        for group, settings in zip(self.groups, self.optimizer.param_groups, strict=True):
            if group.name != MASK_LOGITS:
                settings["lr"] = settings["lr"] if moves else 0.0
                for parameter in group.parameters:
                    parameter.requires_grad_(moves)
            rates[group.name] = float(settings["lr"])
        return rates

    def _not_finite(self, sums: torch.Tensor) -> str | None:
        """Which of this rank's losses and gradients, averaged over data-parallel ranks, is not finite; None if all are."""
        if not bool(torch.isfinite(sums).all()):
            terms = {"cross-entropies of the micro-batches": [float(loss) for loss in self.micro_batches.losses]}
            _, _, kl, squarehead = sums[:4].tolist()
            compared = {"kl": kl, "squarehead": squarehead}
            terms |= {f"sum of {name}": compared[name] for name in self.micro_batches.objective.teacher_terms}
            return "the loss is not finite on this rank: " + ", ".join(f"{name} {value}" for name, value in terms.items())
        for buffer in self.model.buffers:
            if not all_finite(buffer.grad_data):
                return "a gradient is not finite on this rank"
        return None


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is infinite or NaN, without a copy of the tensor."""
    # A sum is finite only if every entry is, and on CPUs it takes a twentieth of the time of the largest magnitude. Entries whose sum
    # overflows can all be finite.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(torch.linalg.vector_norm(tensor, ord=torch.inf)))
