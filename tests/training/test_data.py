"""What deals the data out to the steps: made once for the same data and settings, whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from maskllm.errors import MaskLLMError
from maskllm.training.arguments import TrainArguments
from maskllm.training.data import Batches, build_batches, data_identity


def write_dataset(prefix: Path, documents: int) -> None:
    """Documents of 100 tokens, each token 1 more than the one before it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for first in range(0, 100 * documents, 100):
        builder.add_document(torch.arange(first, first + 100), [100])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def arguments(tmp_path) -> TrainArguments:
    write_dataset(tmp_path / "data", 10)
    return TrainArguments(
        data_path=[str(tmp_path / "data")], load="checkpoint", data_cache_path=str(tmp_path / "cache"), train_iters=20,
        global_batch_size=2, seq_length=32, eval_iters=0, split="1,0,0",
    )  # fmt: skip


def batches(arguments: TrainArguments) -> Batches:
    return build_batches(arguments, data_identity(arguments), 60000, torch.device("cpu"))[0]


def tokens(arguments: TrainArguments) -> torch.Tensor:
    """All that a run sees."""
    found = batches(arguments)
    return torch.stack([found[number].tokens for number in range(arguments.train_iters * arguments.global_batch_size)])


def test_other_data_at_the_same_place_are_dealt_out_anew(arguments, tmp_path):
    assert tokens(arguments).max() < 1000
    write_dataset(tmp_path / "data", 100)
    assert tokens(arguments).max() > 5000
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_same_data_are_dealt_out_once(arguments, tmp_path, monkeypatch):
    before = tokens(arguments)
    monkeypatch.setattr(np, "save", lambda *_: pytest.fail("written again"))
    assert torch.equal(tokens(arguments), before)
    arguments.data_path = ["3", *arguments.data_path]
    assert torch.equal(tokens(arguments), before)


def test_the_default_place_is_beside_the_dataset(arguments, tmp_path):
    arguments.data_cache_path = None
    batches(arguments)
    (index,) = (tmp_path / "data_index_cache").iterdir()
    assert list(index.glob("*.npy"))


def test_a_disk_that_is_full_leaves_nothing_and_what_a_kill_leaves_is_not_used(arguments, tmp_path, monkeypatch):
    save, written = np.save, []

    def fail_at_the_second(file, array, **options):
        written.append(file)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(file, array, **options)

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", fail_at_the_second)
        with pytest.raises(
            MaskLLMError, match=r"index files cannot be written in .*cache \(No space left on device\); name a directory"
        ):
            batches(arguments)
    assert list((tmp_path / "cache").iterdir()) == []
    expected = tokens(arguments)

    (index,) = (tmp_path / "cache").iterdir()
    index.rename(tmp_path / "cache" / f".{index.name}.1a2b3c4d.tmp")
    for file in (tmp_path / "cache").rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(tokens(arguments), expected)


def test_a_damaged_index_is_named(arguments, tmp_path):
    batches(arguments)
    (index,) = (tmp_path / "cache").iterdir()
    for file in index.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(MaskLLMError, match=f"{index}: the dataset's index files are damaged .*; remove this directory"):
        batches(arguments)
