"""The batch whose loss or gradient was not finite, kept for inspection."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file

from maskllm.files import atomic_file, naming
from maskllm.training.data import Batches


def save_bad_batch(
    path: Path, iteration: int, batches: Batches, first: int, num_microbatches: int, losses: list[torch.Tensor]
) -> None:
    """Write a step's global batch, its micro-batches from number `first` on, to `path`; called by all ranks.

    A safetensors file: `tokens` and `labels`, int64 [global batch, sequence], and `losses`, fp32 [micro-batches] in the same order, each
    rank of the last pipeline stage giving those of its own `num_microbatches`; metadata `iteration` and `first_sample`.
    """
    mine = (parallel_state.get_data_parallel_rank(), [float(loss) for loss in losses])
    gathered: list[tuple[int, list[float]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if dist.get_rank() != 0:
        return
    ranks = parallel_state.get_data_parallel_world_size()
    of_micro_batches = torch.full((num_microbatches * ranks,), torch.nan)
    for rank, values in gathered:
        if values:
            of_micro_batches[rank::ranks] = torch.tensor(values)
    parts = [batches[first + index] for index in range(num_microbatches * ranks)]
    tensors = {
        "tokens": torch.cat([part.tokens for part in parts]).cpu(),
        "labels": torch.cat([part.labels for part in parts]).cpu(),
        "losses": of_micro_batches,
    }
    metadata = {"iteration": str(iteration), "first_sample": str(first * batches.micro_batch_size)}
    with atomic_file(path) as temporary, naming(path):
        save_file(tensors, temporary, metadata=metadata)
