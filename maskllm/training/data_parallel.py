"""Megatron Core's data parallelism around the model."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from maskllm.training.arguments import TrainArguments


def data_parallel(arguments: TrainArguments, model: torch.nn.Module) -> DistributedDataParallel:
    """`model` with its gradients in buffers that are reduced over data-parallel ranks at the end of a step."""
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = None
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=arguments.mask_logits_dtype == "fp32",
        overlap_grad_reduce=False,
        use_distributed_optimizer=arguments.use_distributed_optimizer,
    )
    return DistributedDataParallel(model.config, config, model)
