"""Join the job's processes and set up Megatron's process groups, on CUDA with NCCL or on the CPU with gloo."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

import megatron_patches
from maskllm.distributed import meet
from maskllm.errors import MaskLLMError, StoppedError


@contextlib.contextmanager
def parallel_processes(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    timeout_minutes: float = 10,
) -> Iterator[None]:
    """Join the processes that torchrun started (or be the only one) and set up Megatron's groups while the block runs.

    Raises MaskLLMError if the number of processes is not a multiple of the sizes, or a process has no GPU of its own.
    """
    megatron_patches.apply()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % (tensor_model_parallel_size * pipeline_model_parallel_size):
        raise MaskLLMError(
            f"{world} processes: wanted a multiple of --tensor-model-parallel-size {tensor_model_parallel_size} x "
            f"--pipeline-model-parallel-size {pipeline_model_parallel_size} (torchrun --nproc-per-node sets it)"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise MaskLLMError(
                f"process {local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}; "
                "start at most as many processes (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
        backend = "nccl"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    with contextlib.ExitStack() as stack:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            rank = int(os.environ["RANK"])
            dist.init_process_group(backend, store=meet(rank, world, timeout), rank=rank, world_size=world, timeout=timeout)
        elif "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            store = dist.FileStore(str(Path(folder) / "store"), 1)
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tensor_model_parallel_size,
                pipeline_model_parallel_size=pipeline_model_parallel_size,
                distributed_timeout_minutes=timeout_minutes,
            )
            if torch.cuda.is_available():
                # Megatron's sequence parallelism needs these random states to exist. Nothing draws from them: there is no dropout.
                model_parallel_cuda_manual_seed(1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def run_in_group(
    call: Callable[[], int],
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    timeout_minutes: float = 10,
) -> int:
    """Run `call` in `parallel_processes` and return its exit status.

    `call` must report its own failure (`maskllm.failures`). Once the group goes down, the other ranks fail because this one is gone.
    """
    with parallel_processes(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        timeout_minutes=timeout_minutes,
    ):
        status = call()
        if status not in (0, StoppedError.exit_status) and torch.cuda.is_available() and dist.get_world_size() > 1:
            # Destroying NCCL's groups is collective, and the other ranks may be waiting for this one in another collective.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status
