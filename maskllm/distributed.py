"""Bring up torch.distributed and Megatron's process groups, under torchrun or alone, on CUDA with NCCL or on the CPU with gloo."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

import megatron_patches
from maskllm.errors import MaskLLMError, StoppedError

T = TypeVar("T")


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


_attempt: str | None = None
"""A word that is this attempt's at the job alone, the same on all ranks, once they have met."""


def job_store(scope: str) -> dist.Store | None:
    """A connection of its own to the key-value store that the job's processes meet in, its keys below `scope`; None for one process.

    Under torchrun the store outlives the ranks and is there before they have met; the keys are this attempt's alone. Raises RuntimeError
    where the process that kept it has gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
        return None
    names = ("TORCHELASTIC_RUN_ID", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT")  # the count is each node's own
    attempt = _attempt or "/".join(os.environ.get(name, "") for name in names)
    return dist.PrefixStore(f"maskllm/{attempt}/{scope}", _connect(datetime.timedelta(seconds=10)))


def _connect(timeout: datetime.timedelta) -> dist.TCPStore:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)


def _meet(store: dist.Store, rank: int, ranks: int) -> str:
    """Agree on a word for this attempt at the job in a store that earlier attempts have used, whatever they left in it.

    torchrun keeps one store over all of a job's restarts, and its agents count restarts each for itself
    (https://github.com/pytorch/pytorch/issues/135712): `init_process_group` would find the addresses of dead processes in it.
    Every rank asks under a name of its own making, which only a living first rank can answer.
    """
    mine = uuid.uuid4().hex
    if rank != 0:
        store.set(f"asking/{rank}", mine)
        attempt = store.get(f"answer/{mine}").decode()
        store.set(f"heard/{attempt}/{rank}", "")
        return attempt
    waiting = set(range(1, ranks))
    answered = set()
    deadline = time.monotonic() + store.timeout.total_seconds()
    while waiting:
        for other in [other for other in waiting if store.check([f"asking/{other}"])]:
            asking = store.get(f"asking/{other}").decode()
            if asking not in answered:
                store.set(f"answer/{asking}", mine)
                answered.add(asking)
            if store.check([f"heard/{mine}/{other}"]):
                waiting.remove(other)
        if time.monotonic() > deadline:
            raise MaskLLMError(f"ranks {sorted(waiting)} did not come within {store.timeout.total_seconds():.0f} s")
        time.sleep(0.01)
    return mine


def lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process has gone, or has not answered in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in ("gloo", "NCCL")))


def from_first_rank(value: T) -> T:
    """The first rank's `value`, on all ranks of the job, if there is one."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether any rank of the job has it set; called by all of them."""
    tensor = torch.tensor([float(flag) for flag in flags], device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def is_first_rank() -> bool:
    """Whether this is the first rank of the job, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextlib.contextmanager
def raised_together() -> Iterator[None]:
    """A block that all ranks of the job, if there is one, leave with the same MaskLLMError where one or more of them raise one."""
    failures: list[str | None] = [None]
    try:
        yield
    except MaskLLMError as error:
        failures = [str(error)]
    if dist.is_initialized():
        mine, failures = failures[0], [None] * dist.get_world_size()
        dist.all_gather_object(failures, mine)
    for failure in filter(None, failures):
        raise MaskLLMError(failure)


@contextlib.contextmanager
def parallel_processes(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    timeout_minutes: float = 10,
) -> Iterator[None]:
    """Join the processes that torchrun started (or be the only one) and set up Megatron's groups for as long as the block runs.

    Raises MaskLLMError where the number of processes does not divide by the sizes asked for.
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
            global _attempt
            store, rank = _connect(timeout), int(os.environ["RANK"])
            _attempt = _meet(dist.PrefixStore("maskllm", store), rank, world)
            store = dist.PrefixStore(_attempt, store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
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
                # Megatron's sequence parallelism wants these random states to exist; nothing here draws from them (no dropout).
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
    """Run `call` in `parallel_processes`; returns its exit status.

    `call` reports its own failure (`maskllm.failures`): once the group goes down the other ranks fail too, for want of this one.
    """
    with parallel_processes(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        timeout_minutes=timeout_minutes,
    ):
        status = call()
        if status not in (0, StoppedError.exit_status) and torch.cuda.is_available() and dist.get_world_size() > 1:
            # NCCL's groups go down together, and the others may be waiting for this rank somewhere else.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status
