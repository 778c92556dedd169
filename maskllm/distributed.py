"""What the ranks of a job do together with torch.distributed alone: meet, share a value, agree on a flag, fail with one error."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import uuid
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from maskllm.errors import MaskLLMError

T = TypeVar("T")


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


_restart_id: str | None = None
"""The ID of this start of the job, the same on all ranks. `meet` sets it: torchrun may start the job several times."""


def job_store(scope: str) -> dist.Store | None:
    """A new connection to the job's key-value store, with keys below `scope`; None for a job of one process.

    Under torchrun the store exists before the ranks have met and after they have ended. Keys of earlier starts of the job are not
    visible. Raises RuntimeError if the process that keeps the store has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
        return None
    names = ("TORCHELASTIC_RUN_ID", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT")  # each node has its own count
    restart = _restart_id or "/".join(os.environ.get(name, "") for name in names)
    return dist.PrefixStore(f"maskllm/{restart}/{scope}", _connect(datetime.timedelta(seconds=10)))


def _connect(timeout: datetime.timedelta) -> dist.TCPStore:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)


def meet(rank: int, ranks: int, timeout: datetime.timedelta) -> dist.Store:
    """Meet the other ranks under torchrun and return a store that only this start of the job uses, for `init_process_group`.

    torchrun keeps one store over all restarts of a job, and each node's agent counts restarts for itself
    (https://github.com/pytorch/pytorch/issues/135712). Without a prefix of its own, `init_process_group` would find the addresses of
    dead processes in that store. Raises MaskLLMError if a rank does not come within `timeout`.
    """
    global _restart_id
    store = _connect(timeout)
    _restart_id = _agree_on_restart_id(dist.PrefixStore("maskllm", store), rank, ranks)
    return dist.PrefixStore(_restart_id, store)


def _agree_on_restart_id(store: dist.Store, rank: int, ranks: int) -> str:
    """Agree on a unique ID for this start of the job, whatever earlier starts left in the store.

    Rank 0 makes the ID. Every other rank asks for it under a key of its own that only a living rank 0 can answer.
    """
    mine = uuid.uuid4().hex
    if rank != 0:
        store.set(f"asking/{rank}", mine)
        restart_id = store.get(f"answer/{mine}").decode()
        store.set(f"heard/{restart_id}/{rank}", "")
        return restart_id
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
    """Whether a collective failed because another process has ended or did not answer in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in ("gloo", "NCCL")))


def from_first_rank(value: T) -> T:
    """Rank 0's `value` on all ranks of the job; `value` itself without a job."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank of the job. All ranks must call this."""
    tensor = torch.tensor([float(flag) for flag in flags], device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes in the job; (0, 1) without a job."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    """Return as soon as all ranks have come here; at once in a job of one process without a process group."""
    if dist.is_initialized():
        dist.barrier()


def is_first_rank() -> bool:
    """Whether this is rank 0 of the job, or the only process."""
    return rank_and_size()[0] == 0


@contextlib.contextmanager
def raised_together() -> Iterator[None]:
    """If any rank raises a MaskLLMError in this block, all ranks of the job leave it with that error."""
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
