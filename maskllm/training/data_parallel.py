"""Megatron Core's data parallelism around a model whose only trained parameters are each rank's own."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from maskllm.training.arguments import TrainArguments


def data_parallel(arguments: TrainArguments, model: torch.nn.Module) -> DistributedDataParallel:
    """`model` with its gradients in buffers that are reduced over data-parallel ranks at the end of a step."""
    model.config.finalize_model_grads_func = _finish_gradients
    model.config.no_sync_func = None
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=arguments.mask_logits_dtype == "fp32",
        overlap_grad_reduce=False,
        use_distributed_optimizer=arguments.use_distributed_optimizer,
    )
    return DistributedDataParallel(model.config, config, model)


def _finish_gradients(model: list[torch.nn.Module], *_: Any, **__: Any) -> None:
    # Only logits have gradients, and each rank owns its logits, so the reduction over data-parallel ranks is all. Upstream's
    # finalize_model_grads would also reduce norms and tied embeddings, which are frozen here.
    for chunk in model:
        chunk.finish_grad_sync()
