"""Writing a job's checkpoints from all its ranks, at once or behind the training, so that each appears whole or not at all.

Every rank writes its own files into a hidden directory beside the iteration's, and their checksums right after them, in the process that
wrote them: so the reading that they cost is spread over the ranks, finds the files in the page cache, and stays behind the training
where the writing does. The first rank then adds the manifest, renames the directory and moves `latest_checkpointed_iteration.txt`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import os
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from maskllm.checkpoints.checksums import FileRecord, write_manifest
from maskllm.checkpoints.finding import LATEST, Iteration, is_complete, iteration_name, iteration_number
from maskllm.checkpoints.info import CheckpointInfo
from maskllm.checkpoints.reading import one_line, without_extra_state
from maskllm.checkpoints.writing import write_metadata
from maskllm.distributed import any_rank, from_first_rank
from maskllm.errors import MaskLLMError, as_line, first_line
from maskllm.files import publish_directory, read_json_object, write_json, write_text
from maskllm.huggingface.directory import read_side_files
from maskllm.processes import end_with_parent

_POLL_SECONDS = 0.02
# From 0.19 on Megatron prefers an optional package's writer to its own, and asks for it by default.
_OWN_WRITER = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}


class CheckpointSaver:
    """Writes the iterations of one checkpoint directory. Every rank of the job has one and makes the same calls.

    Args:
        root: The checkpoint directory.
        hf_files_from: The Hugging Face directory whose config, tokenizer and so on go along. They are read here, once: it may be removed.
        background: Whether `save` returns once this rank's tensors are copied (CUDA) or its process has been forked (CPU), and the
            writing (Megatron's `async_sharded_save`) goes on behind it. A save waits for the one before it.
        keep_last: How many complete iterations to keep; all without it. "release" and `protected` always stay.
        protected: An iteration directory that stays.
        progress: Called again and again while a save is waited for and some rank's writer lives.
        patience: For how many seconds after its beginning a save is waited for.
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
        patience: float = math.inf,
    ) -> None:
        self.root = Path(root)
        self._hf_files = read_side_files(hf_files_from) if dist.get_rank() == 0 else {}
        self.background = background
        self.keep_last = keep_last
        self.protected = protected
        self.progress = progress
        self.patience = patience
        self._started = 0.0
        self._queue = AsyncCallsQueue()
        self._writing: tuple[Path, Path] | None = None
        """The iteration directory that is being written, and the hidden one beside it."""

    def save(self, iteration: Iteration, sharded_state_dict: dict[str, Any], info: CheckpointInfo) -> Path:
        """Write an iteration from every rank's sharded state dict; returns its directory.

        The directory takes its name, and becomes the latest, once every rank has written its part: before this returns or, in the
        background, in a later call of `poll` or `finish`. Raises MaskLLMError on all ranks where one cannot write.
        """
        self.finish()
        path = self.root / iteration_name(iteration)
        temporary = path.with_name(f".{path.name}.{_shared_token()}.tmp")

        def publish() -> None:
            records: dict[str, FileRecord] = {}
            for part in temporary.glob(".records_*.json"):
                records |= {name: FileRecord(**record) for name, record in read_json_object(part).items()}
                part.unlink()
            write_metadata(temporary, info, self._hf_files)
            write_manifest(temporary, records)
            publish_directory(temporary, path)
            write_text(self.root / LATEST, f"{iteration}\n")
            self._remove_older(iteration)

        _on_first_rank(lambda: temporary.mkdir(parents=True))
        self._writing, self._started = (path, temporary), time.monotonic()
        with self._checked():
            request = dist_checkpointing.save(
                without_extra_state(sharded_state_dict), str(temporary), async_sharded_save=True, **_OWN_WRITER
            )
            if request.async_fn is not None:
                write = functools.partial(_write_and_record, request.async_fn, temporary, dist.get_rank())
                request = request._replace(async_fn=write)
            request.add_finalize_fn(lambda: _on_first_rank(publish))
            self._queue.schedule_async_request(request)
        if not self.background:
            self.finish()
        return path

    def poll(self) -> None:
        """Make what has been written appear, if all ranks have. Raises MaskLLMError as `save` does."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for what is being written and make it appear.

        Raises MaskLLMError as `save` does, and with the names of the ranks that still write when `patience` is over.
        """
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if self._writing is None:
            return
        with self._checked():
            self._queue.maybe_finalize_async_calls(blocking=False)
            while blocking and self._queue.get_num_unfinalized_calls():
                # Not upstream's own wait, which leaves the ranks that are done in a collective for as long as the slowest disk takes.
                (late,) = any_rank(time.monotonic() - self._started > self.patience)
                if late:
                    raise MaskLLMError(self._late())
                time.sleep(_POLL_SECONDS)
                self.progress()
                self._queue.maybe_finalize_async_calls(blocking=False)
        if not self._queue.get_num_unfinalized_calls():
            self._writing = None

    def _late(self) -> str:
        """Which ranks' writers have not ended, the same words on all ranks."""
        mine = f"rank {dist.get_rank()} on {socket.gethostname()}" if any(one.is_alive() for one in self._writers()) else ""
        found = [mine] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        path, _ = self._writing
        still = ", ".join(filter(None, found)) or "none by now"
        return f"{path}: not written within {self.patience:.0f} s, those who still write are {still}"

    def _writers(self) -> list[BaseProcess]:
        """This rank's processes that write."""
        processes = [call.async_caller.process for call in self._queue.async_calls]
        return [process for process in processes if process is not None]

    def abandon(self) -> None:
        """End this rank's writer, if one is at work, and remove what has been written: the run has failed."""
        for writer in self._writers():
            writer.kill()
            writer.join(1)
        if self._writing is not None and dist.get_rank() == 0:
            shutil.rmtree(self._writing[1], ignore_errors=True)

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        """A part of saving: an exception becomes one MaskLLMError, the same on all ranks, and what was written is removed."""
        path, _ = self._writing
        try:
            with one_line(f"{path}: cannot be written"):
                yield
        except MaskLLMError as error:
            message, cause = str(error), error.__cause__
            self.abandon()
            if isinstance(cause, CheckpointException):  # raised on all ranks together, with the reason on the first alone
                message = from_first_rank(message)
            raise MaskLLMError(f"{message}; older checkpoints are as they were") from cause

    def _remove_older(self, newest: int) -> None:
        """Remove the iterations beyond `keep_last`, counted back from `newest`."""
        if self.keep_last is None:
            return
        complete = {number: entry for entry in self.root.iterdir() if (number := iteration_number(entry)) is not None}
        complete = {number: entry for number, entry in complete.items() if number <= newest and is_complete(entry)}
        for number in sorted(complete, reverse=True)[self.keep_last :]:
            if self.protected is None or complete[number].resolve() != self.protected.resolve():
                removed = complete[number].with_name(f".{complete[number].name}.removed")
                os.replace(complete[number], removed)  # at once, so that no half of it is ever taken for a checkpoint
                shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Remove what killed jobs left half-written or half-removed below `root`. No other job may be writing there."""
    for entry in root.glob(".iter_*.tmp"):
        shutil.rmtree(entry, ignore_errors=True)
    for entry in root.glob(".iter_*.removed"):
        shutil.rmtree(entry, ignore_errors=True)
    for entry in root.glob(".iter_*.old"):  # moved aside for one that may not have come
        path = root / entry.name.removeprefix(".").removesuffix(".old")
        if path.exists():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            os.replace(entry, path)


def _write_and_record(write: Callable[..., None], directory: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """Megatron's `write`, which keeps its failures for later, then the records of its files; the first rank makes those that lack.

    In a process of its own, which ends with the rank, without which nobody would publish what it writes, and when one that it has started
    is killed.
    """
    end_with_parent()
    signal.signal(signal.SIGCHLD, _end_with_killed_child)
    write(*args, **kwargs)
    buckets = args[1]
    try:
        records = {name: dataclasses.asdict(FileRecord.of(Path(path))) for path, name, _ in buckets}
        write_json(directory / f".records_{rank:05d}.json", records)
    except OSError:
        return


def _end_with_killed_child(*_: Any) -> None:
    """A handler of SIGCHLD: end this process where a signal (most often for want of memory) has ended one that it has started.

    Up to 0.18 Megatron's writer starts processes, and waits for ever for one that does not come to its end.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None and ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
                os._exit(1)


def _shared_token() -> str:
    """A random word, the same on all ranks: a killed job's writers may live on for a while and must not meet a later job's."""
    return from_first_rank(uuid.uuid4().hex[:8])


def _on_first_rank(action: Callable[[], None]) -> None:
    """Run `action` on rank 0 while the others wait; an exception there is raised everywhere, as the same MaskLLMError."""
    failure = ""
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            failure = as_line(error) or first_line(error)
    failure = from_first_rank(failure)
    if failure:
        raise MaskLLMError(failure)
