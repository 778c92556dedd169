"""Patches of how Megatron Core saves and loads checkpoints, on any device."""

from __future__ import annotations

import functools
import importlib
import os
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from maskllm.processes import end_with_parent
from megatron_patches.patch import Patch, upstream_object

_MODULE = "megatron.core.dist_checkpointing.strategies.filesystem_async"


class _Results:
    """Passes one value, a save's result, from the writer (a fork of this process) to this process, through shared memory."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("write results"), "w+b")

    def put(self, value: Any) -> None:
        self._file.write(ForkingPickler.dumps(value))
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        data = self._file.read()
        try:
            return pickle.loads(data)
        except (EOFError, pickle.UnpicklingError):
            return RuntimeError(
                "the process that writes it ended before its end; most often the system killed it because memory ran out"
            )


def results_without_a_process() -> None:
    """Keep the writers' results in shared memory instead of in another process.

    Upstream's `get_write_results_queue` (0.16: `_get_write_results_queue`) spawns a process that keeps the results. To stop a rank,
    a launcher sends SIGTERM to all of the rank's processes; torchrun sends it to the process group. That ends the spawned process,
    and the rank cannot write its last checkpoint. The spawned process also starts Python and torch a second time on every rank.
    """
    module = importlib.import_module(_MODULE)
    name = next(name for name in ("get_write_results_queue", "_get_write_results_queue") if hasattr(module, name))
    setattr(module, name, _Results)


def failed_write_says_why() -> None:
    """Keep the message of a failed write's exception, such as "no space left on device".

    In 0.19, upstream's writer replaces the exception by its type, and the message is lost. The writer calls `write_preloaded_data`
    without a queue for the part that it writes itself. This patch raises the exception there, so that the writer keeps the message.
    """
    writer = importlib.import_module(_MODULE).FileSystemWriterAsync
    write = writer.write_preloaded_data

    @functools.wraps(write)  # upstream counts its parameters
    def write_or_raise(*args: Any, results_queue: Any, **kwargs: Any) -> Any:
        output = write(*args, results_queue=results_queue, **kwargs)
        if results_queue is None and isinstance(output[1], Exception):
            raise output[1]
        return output

    writer.write_preloaded_data = staticmethod(write_or_raise)


def writers_end_with_what_started_them() -> None:
    """End the processes that write files for a save if the process that started them is killed.

    When such a process has finished, upstream makes it notify its parent and wait until the parent wakes up. If the parent has been
    killed, it would wait forever and keep its files open, such as the lock on the directory of checkpoints.
    """
    writer = importlib.import_module(_MODULE).FileSystemWriterAsync
    write = writer.write_preloaded_data

    @functools.wraps(write)  # upstream counts its parameters
    def write_and_end(*args: Any, results_queue: Any, **kwargs: Any) -> Any:
        if results_queue is not None:  # without a queue, the writer writes in its own process
            end_with_parent()
        return write(*args, results_queue=results_queue, **kwargs)

    writer.write_preloaded_data = staticmethod(write_and_end)


def torch_adams_steps_are_no_tensors_to_load() -> None:
    """Load the states of torch's Adam without the "step" of each parameter.

    `DistributedOptimizer` loads Adam's states by name. Torch's Adam has a state "step"; Transformer Engine's and Apex's do not.
    A checkpoint stores the step once for all parameters, so upstream raises KeyError. This patch keeps the present "step".

    Each parameter gets a copy of that tensor. Upstream gives all parameters the same tensor, and every one would increment it.
    """
    optimizer = upstream_object("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer")
    load = optimizer._set_main_param_and_optimizer_states

    @functools.wraps(load)
    def load_with_step(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        if isinstance(self.optimizer, torch.optim.Adam):
            group, order = self.model_param_group_index_map[model_param]
            state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
            state["step"] = state["step"].clone()
            tensors = tensors | {"step": state["step"]}
        load(self, model_param, tensors)

    optimizer._set_main_param_and_optimizer_states = load_with_step


PATCHES = [
    Patch(failed_write_says_why, _MODULE, "assert isinstance(local_results_or_exc, list), type(local_results_or_exc)"),
    Patch(writers_end_with_what_started_them, _MODULE, "count_queue.task_done()"),
    Patch(results_without_a_process, _MODULE, "ctx.Manager().Queue()"),
    Patch(
        torch_adams_steps_are_no_tensors_to_load,
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        "for key in dst_tensors:",
    ),
]
