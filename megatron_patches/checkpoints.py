"""Patches of Megatron Core's checkpointing, on any device."""

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
    """What a save's writer, a fork of this process, hands back when it ends: one value, in memory that both see."""

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
                "the process that writes it ended before its end; most often the system has killed it for want of memory"
            )


def results_without_a_process() -> None:
    """`get_write_results_queue` (0.16: `_get_write_results_queue`) starts a process by spawn that keeps the writers' results.

    A launcher that asks a rank to stop sends SIGTERM to all of the rank's processes, torchrun to its process group: that one ends, and the
    rank cannot write the checkpoint that it was asked to stop with. It also costs every rank a second start of Python and torch.
    """
    module = importlib.import_module(_MODULE)
    name = next(name for name in ("get_write_results_queue", "_get_write_results_queue") if hasattr(module, name))
    setattr(module, name, _Results)


def failed_write_says_why() -> None:
    """In 0.19 the writer puts the type of a failed write's exception in the place of the exception: that the disk is full is lost.

    The write that the writer does itself is handed no queue; its exception is raised here, and the writer keeps its words.
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
    """A process that writes files for a save tells the one that started it when it has finished, and waits for ever for that to wake
    where it has been killed: with it would stay what it has open, such as the lock on the directory of checkpoints."""
    writer = importlib.import_module(_MODULE).FileSystemWriterAsync
    write = writer.write_preloaded_data

    @functools.wraps(write)  # upstream counts its parameters
    def write_and_end(*args: Any, results_queue: Any, **kwargs: Any) -> Any:
        if results_queue is not None:  # else it is the writer itself
            end_with_parent()
        return write(*args, results_queue=results_queue, **kwargs)

    writer.write_preloaded_data = staticmethod(write_and_end)


def torch_adams_steps_are_no_tensors_to_load() -> None:
    """`DistributedOptimizer` loads Adam's states by their names. Torch's Adam, unlike Transformer Engine's and Apex's, has a "step" among
    them, which a checkpoint holds once for all parameters: upstream ends with a KeyError. Here the one that is there stays.

    Each parameter gets a tensor of its own: upstream gives all of them the same, which every one of them would count up.
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
