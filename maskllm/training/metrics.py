"""The numbers that a run reports about its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from maskllm.distributed import device
from maskllm.environment.memory import peak_memory_bytes
from maskllm.masking.parameter import MaskedParameter
from maskllm.patterns import blocks_that_differ
from maskllm.training.arguments import TrainArguments
from maskllm.training.cast import Cast
from maskllm.training.micro_batches import MicroBatches, mean_losses
from maskllm.training.step import StepResult


class WinnerTracker:
    """Counts the blocks whose arg-max candidate has changed since the last call and since the prior."""

    def __init__(self, masked: Sequence[MaskedParameter]) -> None:
        self.masked = masked
        self.previous = [parameter.winner_bits() for parameter in masked]

    def changed(self) -> tuple[int, int]:
        """(blocks changed since the last call, blocks that differ from the prior; 0 without one), on this rank."""
        since_last = since_prior = 0
        for index, parameter in enumerate(self.masked):
            bits = parameter.winner_bits()
            since_last += _blocks_that_differ(bits, self.previous[index], parameter)
            if parameter.bits is not None:
                since_prior += _blocks_that_differ(bits, parameter.bits, parameter)
            self.previous[index] = bits
        return since_last, since_prior


def _blocks_that_differ(bits: torch.Tensor, other: torch.Tensor, parameter: MaskedParameter) -> int:
    return int(blocks_that_differ(bits, other, parameter.shape[1], parameter.sampler.pattern.m))


class TrainMetrics:
    """The metrics of a run's steps, the same on every rank. All ranks make the same calls."""

    def __init__(
        self, arguments: TrainArguments, masked: Sequence[MaskedParameter], micro_batches: MicroBatches, cast: Cast | None
    ) -> None:
        self.arguments = arguments
        self.cast = cast
        self.micro_batches = micro_batches
        self.objective = micro_batches.objective
        self.has_prior = masked[0].bits is not None
        self.tracker = WinnerTracker(masked) if arguments.trains_masks else None
        self.num_blocks = 0
        if arguments.trains_masks:
            self.num_blocks = _model_parallel_sum(sum(parameter.logits[..., 0].numel() for parameter in masked))

    def of_steps(self, window: list[StepResult], seconds: float) -> dict[str, Any]:
        """Metrics of the steps in `window`, which took `seconds`. Means over steps are None if all steps were skipped."""
        good = [step for step in window if not step.skipped]
        steps = len(good)
        local = torch.stack([step.sums for step in good] or [torch.zeros_like(window[0].sums)]).double()
        losses = mean_losses(local[:, :4].sum(0))
        values: dict[str, Any] = {"loss": losses.cross_entropy if steps else None}
        values |= {name: getattr(losses, name) if steps else None for name in self.objective.teacher_terms}
        if self.tracker is not None:
            values |= self._of_masks(good, local)
        if self.cast is not None:
            values |= self._of_cast(window[-1].iteration)
        memory = torch.tensor(float(peak_memory_bytes(device())), dtype=torch.float64, device=device())
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        tokens = len(window) * self.arguments.global_batch_size * self.arguments.seq_length
        rates = list(window[-1].learning_rates.values())
        values |= {
            "grad_norm": sum(step.grad_norms[0] for step in good) / steps if steps else None,
            "skipped_steps": len(window) - steps,
            "learning_rate": rates[0],
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": float(memory) / 2**30,
        }
        if self.arguments.train == "both":
            values["weights_grad_norm"] = sum(step.grad_norms[-1] for step in good) / steps if steps else None
            values["weights_learning_rate"] = rates[-1]
        return values

    def _of_cast(self, iteration: int) -> dict[str, Any]:
        """The metrics of CAST: of the last refresh of the masks, and after the last step of the masks that the run ends with."""
        cast = self.cast
        change = cast.look() if iteration + 1 == self.arguments.train_iters else cast.last
        changed = outside = None
        if change is not None:
            changed = _model_parallel_sum(change.changed) / _model_parallel_sum(change.blocks)
            outside = _model_parallel_sum(change.outside) / _model_parallel_sum(change.total)
        return {"l1_decay": cast.adam.alpha * cast.adam.decay, "changed_since_refresh": changed, "l1_outside_mask": outside}

    def _of_masks(self, good: list[StepResult], local: torch.Tensor) -> dict[str, Any]:
        """The metrics of the masks; `local` are the sums of the steps `good`, or one row of zeros."""
        since_last, since_prior = self.tracker.changed()
        # Every data-parallel rank draws its own masks; all of them count.
        draws = self.micro_batches.per_step
        squares, probability = local[:, 4].clone(), local[:, 5].clone()
        for values in (squares, probability):
            dist.all_reduce(values)
        sampler, steps = self.objective.sampler, [step.iteration for step in good]
        return {
            "regularizer": self.objective.regularizer(steps, squares.tolist(), draws) if steps else None,
            "temperature": sampler.temperature,
            "scale": sampler.scale,
            "mean_max_probability": float(probability.sum()) / (len(steps) * draws * self.num_blocks) if steps else None,
            "changed_since_last": _model_parallel_sum(since_last) / self.num_blocks,
            "changed_since_prior": _model_parallel_sum(since_prior) / self.num_blocks if self.has_prior else None,
        }


def _model_parallel_sum(value: float) -> float:
    """Sum over the ranks that hold parts of one model."""
    total = torch.tensor(float(value), dtype=torch.float64, device=device())
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return float(total)
