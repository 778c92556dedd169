"""Saving from a job: in the background or not, with writers that are killed, slow or too slow."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from maskllm.checkpoints.finding import LATEST
from maskllm.checkpoints.reading import resolve
from maskllm.checkpoints.saving import CheckpointSaver
from maskllm.errors import MaskLLMError

pytestmark = pytest.mark.usefixtures("megatron")


def state() -> dict[str, ShardedTensor]:
    return {"w": ShardedTensor.from_rank_offsets("w", torch.ones(1000))}


@pytest.mark.parametrize("background", [False, True])
def test_a_killed_writer_fails_its_save_but_no_later_save(dense, background, tmp_path, monkeypatch):
    """The kernel does this if memory runs out: it kills a process that writes files, or the process that has started that one."""

    def die(*_, results_queue, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint = resolve(dense)
    saver = CheckpointSaver(tmp_path / "run", checkpoint.hf_directory, background=background)
    with (
        monkeypatch.context() as patched,
        pytest.raises(MaskLLMError, match=r"iter_0000003: cannot be written .*the process that writes it ended before its end"),
    ):
        patched.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(die))
        saver.save(3, state(), checkpoint.info)
        saver.finish()
    shutil.rmtree(dense)  # the saver has read the config and tokenizer files when it was made
    saver.save(4, state(), checkpoint.info)
    saver.finish()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["iter_0000004", LATEST]
    assert (tmp_path / "run" / "iter_0000004" / "hf" / "config.json").is_file()


@pytest.fixture
def slow_writers(monkeypatch) -> Callable[[float], None]:
    """Call it to make all writers take so many seconds longer."""
    write = FileSystemWriterAsync.write_preloaded_data

    def slow_down(seconds: float) -> None:
        def slow(*values, **named):
            time.sleep(seconds)
            return write(*values, **named)

        monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(slow))

    return slow_down


def test_progress_is_reported_while_a_save_is_waited_for(llama3_dense, slow_writers, tmp_path):
    slow_writers(1)
    calls = []
    checkpoint = resolve(llama3_dense)
    saver = CheckpointSaver(tmp_path / "run", checkpoint.hf_directory, progress=lambda: calls.append(time.monotonic()))
    saver.save(3, state(), checkpoint.info)
    assert resolve(tmp_path / "run").iteration == 3
    assert len(calls) > 2
    assert calls[-1] - calls[0] > 0.5, "no report during the wait"


def descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def assert_gone(writers: set[psutil.Process]) -> None:
    assert writers, "no process was writing"
    _, alive = psutil.wait_procs(writers, timeout=10)
    assert not alive, "a writer goes on"


def test_a_save_that_takes_too_long_is_ended_with_the_names_of_the_ranks_that_write(llama3_dense, slow_writers, tmp_path):
    slow_writers(60)
    checkpoint, before = resolve(llama3_dense), descendants()
    saver = CheckpointSaver(tmp_path / "run", checkpoint.hf_directory, background=True, timeout=0.3)
    saver.save(3, state(), checkpoint.info)
    writers = descendants() - before
    words = r"iter_0000003: not written within 0 s; ranks still writing: rank 0 on \S+; older checkpoints are as they were"
    with pytest.raises(MaskLLMError, match=words):
        saver.finish()
    assert_gone(writers)
    assert not list((tmp_path / "run").iterdir())


def test_a_failed_run_removes_what_it_was_writing(llama3_dense, slow_writers, tmp_path):
    slow_writers(60)
    checkpoint, before = resolve(llama3_dense), descendants()
    saver = CheckpointSaver(tmp_path / "run", checkpoint.hf_directory, background=True)
    saver.save(3, state(), checkpoint.info)
    writers = descendants() - before
    assert list((tmp_path / "run").glob(".iter_0000003.*.tmp"))
    saver.abandon()
    assert not list((tmp_path / "run").iterdir())
    assert_gone(writers)
