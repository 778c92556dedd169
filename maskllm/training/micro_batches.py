"""Run micro-batches through the pipeline of Megatron Core, each in its own draw of the masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from maskllm.distributed import device
from maskllm.masking.draw import Draw, open_draw
from maskllm.training.arguments import TrainArguments
from maskllm.training.data import Batches
from maskllm.training.objective import Objective


class MicroBatches:
    """How this rank goes through its share of the micro-batches of a step or of a validation."""

    def __init__(
        self, arguments: TrainArguments, model: torch.nn.Module, objective: Objective, progress: Callable[[], None]
    ) -> None:
        """`progress` is called before each micro-batch."""
        self.arguments = arguments
        self.model = model
        self.objective = objective
        self.progress = progress
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.count = arguments.num_microbatches(self.dp_size)
        """Micro-batches of a step on each data-parallel rank."""
        self.losses: list[torch.Tensor] = []
        """Of the last run's micro-batches, fp32 scalars, on the last pipeline stage."""

    @property
    def per_step(self) -> int:
        """Micro-batches of a step over all data-parallel ranks."""
        return self.count * self.dp_size

    def run(self, batches: Batches, first: int, *, sample_of: Callable[[int], int], forward_only: bool) -> torch.Tensor:
        """Run `count` micro-batches of this data-parallel rank.

        Returns fp32 [4]: the sum of the cross-entropies and their number, and the sum of the divergences from the teacher, on the last
        pipeline stage; and the sum of SquareHead's terms of this stage's layers.

        Batch `first + i`, with i counting the micro-batches of all data-parallel ranks, uses the masks of the global sample index
        `sample_of(i)`.
        """
        numbers = iter(range(self.count))
        pair = self.objective.pair
        if pair is not None:
            pair.squarehead_terms = torch.zeros((), dtype=torch.float32, device=device())

        def forward_step(_: Any, model: torch.nn.Module, *__: Any) -> tuple[torch.Tensor, Any]:
            index = next(numbers) * self.dp_size + self.dp_rank
            self.progress()
            batch = batches[first + index]
            with open_draw(Draw(sample_of(index))):
                output = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
            return output, self.objective.micro_batch

        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=self.model,
            num_microbatches=self.count,
            seq_length=self.arguments.seq_length,
            # The teacher's hidden states travel with the student's.
            micro_batch_size=self.arguments.micro_batch_size * (1 if pair is None else 2),
            forward_only=forward_only,
        )
        self.losses = [report.cross_entropy for report in reports]
        total = torch.zeros(4, dtype=torch.float32, device=device())
        if reports:
            total[0], total[1] = torch.stack(self.losses).sum(), len(self.losses)
            total[2] = torch.stack([report.kl for report in reports]).sum()
        if pair is not None:
            total[3] = pair.squarehead_terms
        return total


class MeanLosses(NamedTuple):
    """Means over the micro-batches of all ranks; NaN if there was none."""

    cross_entropy: float
    kl: float
    squarehead: float
    """The sum over the layers."""


def mean_losses(total: torch.Tensor) -> MeanLosses:
    """The mean losses over all ranks of the job, from each rank's result of `MicroBatches.run` in fp64, which this overwrites.

    All ranks call this. Tensor-parallel ranks have the same losses, so only the first of them counts.
    """
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        total.zero_()
    dist.all_reduce(total)
    cross_entropy, number, kl, squarehead = total.tolist()
    return MeanLosses(*(value / number if number else math.nan for value in (cross_entropy, kl, squarehead)))
