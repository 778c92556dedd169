"""Keeps the batch of a step whose loss or gradient was not finite, for inspection."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from maskllm.files import atomic_file, explain_safetensors_errors
from maskllm.training.data import Batches
from maskllm.training.micro_batches import MicroBatches


def save_bad_batch(path: Path, iteration: int, batches: Batches, micro_batches: MicroBatches) -> None:
    """Write the global batch of the step that ended as number `iteration` to `path`; all ranks call this.

    A safetensors file: `tokens` and `labels`, int64 [global batch, sequence]; `losses`, fp32 [micro-batches] in the same order,
    from the ranks of the last pipeline stage; metadata `iteration` and `first_sample`.
    """
    mine = (micro_batches.dp_rank, [float(loss) for loss in micro_batches.losses])
    gathered: list[tuple[int, list[float]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if dist.get_rank() != 0:
        return
    losses = torch.full((micro_batches.per_step,), torch.nan)
    for rank, values in gathered:
        if values:
            losses[rank :: micro_batches.dp_size] = torch.tensor(values)
    first = (iteration - 1) * micro_batches.per_step
    parts = [batches[first + index] for index in range(micro_batches.per_step)]
    tensors = {
        "tokens": torch.cat([part.tokens for part in parts]).cpu(),
        "labels": torch.cat([part.labels for part in parts]).cpu(),
        "losses": losses,
    }
    metadata = {"iteration": str(iteration), "first_sample": str(first * batches.micro_batch_size)}
    with atomic_file(path) as temporary, explain_safetensors_errors(path):
        save_file(tensors, temporary, metadata=metadata)
