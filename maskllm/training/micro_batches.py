"""Run micro-batches through the pipeline of Megatron Core, each in its own draw of the masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from maskllm.distributed import device
from maskllm.masking.draw import Draw, open_draw
from maskllm.training.arguments import TrainArguments
from maskllm.training.data import Batches
from maskllm.training.objective import CROSS_ENTROPY, Objective


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
        """Run `count` micro-batches of this data-parallel rank; returns fp32 (sum of losses, their number).

        Batch `first + i`, with i counting the micro-batches of all data-parallel ranks, uses the masks of the global sample index
        `sample_of(i)`.
        """
        numbers = iter(range(self.count))

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
            micro_batch_size=self.arguments.micro_batch_size,
            forward_only=forward_only,
        )
        self.losses = [report[CROSS_ENTROPY] for report in reports]
        total = torch.zeros(2, dtype=torch.float32, device=device())
        if self.losses:
            total[0], total[1] = torch.stack(self.losses).sum(), len(self.losses)
        return total


def mean_loss(total: torch.Tensor) -> float:
    """The mean loss over all ranks of the job, from each rank's fp64 (sum of losses, their number), which this overwrites.

    All ranks call this. Tensor-parallel ranks have the same losses, so only the first of them counts. NaN if there was no loss.
    """
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        total.zero_()
    dist.all_reduce(total)
    return float(total[0] / total[1])
