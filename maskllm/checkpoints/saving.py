"""Saving a job's checkpoints from all its ranks, at once or in the background, so that each appears complete or not at all.

Every rank writes its files into a hidden directory beside the iteration's. The process that writes them also computes their
checksums (`writer_process`), so that this work is spread over the ranks, reads from the page cache, and does not hold up a training
that saves in the background. When all ranks have written, the first rank adds the manifest, renames the directory and updates
`latest_checkpointed_iteration.txt`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from maskllm.checkpoints.checksums import write_manifest
from maskllm.checkpoints.finding import LATEST, Iteration, iteration_name
from maskllm.checkpoints.info import CheckpointInfo
from maskllm.checkpoints.reading import one_line, without_extra_state
from maskllm.checkpoints.removing import remove_older_iterations
from maskllm.checkpoints.writer_process import collect_records, write_and_record
from maskllm.checkpoints.writing import write_metadata
from maskllm.distributed import any_rank, from_first_rank
from maskllm.errors import MaskLLMError, as_line, first_line
from maskllm.files import publish_directory, write_text
from maskllm.huggingface.side_files import read_side_files

_POLL_SECONDS = 0.02
# From 0.19 on Megatron's default is the writer of an optional package. This selects Megatron's own.
_OWN_WRITER = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}


class CheckpointSaver:
    """Writes the iterations of one checkpoint directory. Every rank of the job has one and makes the same calls.

    Args:
        root: The checkpoint directory.
        hf_files_from: A Hugging Face directory. Each iteration gets a copy of its `side_files`. They are read here, once, so the
            directory may be removed afterwards.
        background: Whether `save` returns as soon as this rank's tensors are copied (CUDA) or its process is forked (CPU), and the
            writing continues in the background (Megatron's `async_sharded_save`). A save waits for the one before it.
        keep_last: How many complete iterations to keep; None keeps all. "release" and `protected` always stay.
        protected: An iteration directory that is never removed.
        progress: Called repeatedly while this rank waits for a save.
        timeout: Seconds after which a save that is still being written is abandoned.
    """

    def __init__(
        self,
        root: str | Path,
        hf_files_from: Path,
        *,
        background: bool = False,
        keep_last: int | None = None,
        protected: Path | None = None,
        progress: Callable[[], None] = lambda: None,
        timeout: float = math.inf,
    ) -> None:
        self.root = Path(root)
        self._hf_files = read_side_files(hf_files_from) if dist.get_rank() == 0 else {}
        self.background = background
        self.keep_last = keep_last
        self.protected = protected
        self.progress = progress
        self.timeout = timeout
        self._started = 0.0
        self._queue = AsyncCallsQueue()
        self._writing: tuple[Path, Path] | None = None
        """The iteration directory that is being written, and the hidden directory that its files are in until then."""

    def save(self, iteration: Iteration, sharded_state_dict: dict[str, Any], info: CheckpointInfo) -> Path:
        """Write an iteration from every rank's sharded state dict; returns its directory.

        The directory gets its name, and becomes the latest, when every rank has written its part: before this call returns or, in
        the background, in a later call of `poll` or `finish`. Raises MaskLLMError on all ranks if any rank cannot write.
        """
        self.finish()
        path = self.root / iteration_name(iteration)
        temporary = path.with_name(f".{path.name}.{_shared_token()}.tmp")

        def publish() -> None:
            records = collect_records(temporary)
            write_metadata(temporary, info, self._hf_files)
            write_manifest(temporary, records)
            publish_directory(temporary, path)
            write_text(self.root / LATEST, f"{iteration}\n")
            if self.keep_last is not None:
                remove_older_iterations(self.root, iteration, self.keep_last, self.protected)

        _on_first_rank(lambda: temporary.mkdir(parents=True))
        self._writing, self._started = (path, temporary), time.monotonic()
        with self._abandon_on_failure():
            request = dist_checkpointing.save(
                without_extra_state(sharded_state_dict), str(temporary), async_sharded_save=True, **_OWN_WRITER
            )
            if request.async_fn is not None:
                write = functools.partial(write_and_record, request.async_fn, temporary, dist.get_rank())
                request = request._replace(async_fn=write)
            request.add_finalize_fn(lambda: _on_first_rank(publish))
            self._queue.schedule_async_request(request)
        if not self.background:
            self.finish()
        return path

    def poll(self) -> None:
        """Publish the iteration in the background if all ranks have written it. Raises MaskLLMError as `save` does."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for the iteration in the background and publish it.

        Raises MaskLLMError as `save` does, and after `timeout` with the names of the ranks that are still writing.
        """
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if self._writing is None:
            return
        with self._abandon_on_failure():
            self._queue.maybe_finalize_async_calls(blocking=False)
            while blocking and self._queue.get_num_unfinalized_calls():
                # Upstream's own wait would keep ranks that are done in one collective until the slowest disk is done.
                (late,) = any_rank(time.monotonic() - self._started > self.timeout)
                if late:
                    raise MaskLLMError(self._timeout_message())
                time.sleep(_POLL_SECONDS)
                self.progress()
                self._queue.maybe_finalize_async_calls(blocking=False)
        if not self._queue.get_num_unfinalized_calls():
            self._writing = None

    def _timeout_message(self) -> str:
        """Which ranks are still writing; the same message on all ranks, which all call this."""
        mine = f"rank {dist.get_rank()} on {socket.gethostname()}" if any(one.is_alive() for one in self._writers()) else ""
        found = [mine] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        path, _ = self._writing
        return f"{path}: not written within {self.timeout:.0f} s; ranks still writing: {', '.join(filter(None, found)) or 'none'}"

    def _writers(self) -> list[BaseProcess]:
        """The processes that write this rank's files."""
        processes = [call.async_caller.process for call in self._queue.async_calls]
        return [process for process in processes if process is not None]

    def abandon(self) -> None:
        """Kill this rank's writer, if there is one, and remove the unfinished iteration. For a run that has failed."""
        for writer in self._writers():
            writer.kill()
            writer.join(1)
        if self._writing is not None and dist.get_rank() == 0:
            shutil.rmtree(self._writing[1], ignore_errors=True)

    @contextlib.contextmanager
    def _abandon_on_failure(self) -> Iterator[None]:
        """A block that is a part of saving: an exception abandons the save and becomes one MaskLLMError, the same on all ranks."""
        path, _ = self._writing
        try:
            with one_line(f"{path}: cannot be written"):
                yield
        except MaskLLMError as error:
            message, cause = str(error), error.__cause__
            self.abandon()
            if isinstance(cause, CheckpointException):  # raised on all ranks, but only the first one has the reason
                message = from_first_rank(message)
            raise MaskLLMError(f"{message}; older checkpoints are as they were") from cause


def _shared_token() -> str:
    """A random token, the same on all ranks.

    The writers of a killed job may run on for a while. The token keeps them out of the directory that a later job writes to.
    """
    return from_first_rank(uuid.uuid4().hex[:8])


def _on_first_rank(action: Callable[[], None]) -> None:
    """Run `action` on rank 0 while the others wait. An exception there raises the same MaskLLMError on all ranks."""
    failure = ""
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            failure = as_line(error) or first_line(error)
    failure = from_first_rank(failure)
    if failure:
        raise MaskLLMError(failure)
