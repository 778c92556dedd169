"""Writing a `release` checkpoint: complete or not at all, and never over something else."""

from __future__ import annotations

import shutil

import pytest
import torch

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.finding import LATEST
from maskllm.checkpoints.reading import resolve
from maskllm.checkpoints.torch_dist import LazyTensor
from maskllm.checkpoints.writing import write_checkpoint
from maskllm.errors import MaskLLMError

from .changed import lazy


def test_an_interrupted_write_leaves_the_older_checkpoint(dense):
    before = {file.name: file.stat().st_mtime_ns for file in (dense / "release").iterdir()}
    written = []

    def fail():
        written.extend((dense / ".release.tmp").glob("*.distcp"))
        raise KeyboardInterrupt

    tensors = {"a": lazy(torch.ones(3)), "b": LazyTensor((3,), torch.float32, fail)}
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(dense, tensors, resolve(dense).info, hf_files_from=dense / "release" / "hf", description="")
    assert written, "nothing had been written before the interruption"
    assert {file.name: file.stat().st_mtime_ns for file in (dense / "release").iterdir()} == before
    assert sorted(file.name for file in dense.iterdir()) == [LATEST, "release"]


def test_a_directory_of_another_program_is_not_replaced(llama3_hf, tmp_path):
    (tmp_path / "other" / "release").mkdir(parents=True)
    with pytest.raises(MaskLLMError, match="exists and is not a checkpoint of this program"):
        convert(llama3_hf, tmp_path / "other")


def test_a_release_is_not_written_beside_the_checkpoints_of_a_run(llama3_hf, dense):
    shutil.copytree(dense / "release", dense / "iter_0000008")
    with pytest.raises(MaskLLMError, match="holds the checkpoints of a run; name another --output"):
        convert(llama3_hf, dense)
