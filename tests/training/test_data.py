"""Which samples each step gets depends on the data and the settings only, not on files that earlier runs left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from maskllm.errors import MaskLLMError
from maskllm.training.arguments import TrainArguments
from maskllm.training.data import build_batches


def write_dataset(prefix: Path, documents: int) -> None:
    """Write documents of 100 tokens. Each token is one more than the token before it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for first in range(0, 100 * documents, 100):
        builder.add_document(torch.arange(first, first + 100), [100])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def arguments(tmp_path) -> TrainArguments:
    write_dataset(tmp_path / "data", 10)
    return TrainArguments(
        data_path=[str(tmp_path / "data")], load="checkpoint", train_iters=20, global_batch_size=2, seq_length=32, eval_iters=0,
        split="1,0,0",
    )  # fmt: skip


def test_a_negative_token_is_refused(arguments, tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.int32)
    builder.add_document(torch.full([100], -7), [100])
    builder.finalize(str(tmp_path / "data.idx"))
    with pytest.raises(MaskLLMError, match="--data-path: found token -7, wanted 0 or more"):
        tokens(arguments)


def tokens(arguments: TrainArguments) -> torch.Tensor:
    """All tokens of a run, int64 [micro-batches, micro batch, sequence]."""
    found, _ = build_batches(arguments, 60000, torch.device("cpu"))
    return torch.stack([found[number].tokens for number in range(arguments.train_iters * arguments.global_batch_size)])


def test_new_data_at_the_same_path_give_new_samples(arguments, tmp_path, capfd):
    before = tokens(arguments)
    assert before.max() < 1000
    assert torch.equal(tokens(arguments), before)
    write_dataset(tmp_path / "data", 100)
    assert tokens(arguments).max() > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]
    assert capfd.readouterr() == ("", "")


def test_a_weight_of_one_dataset_changes_nothing(arguments):
    before = tokens(arguments)
    arguments.data_path = ["3", *arguments.data_path]
    assert torch.equal(tokens(arguments), before)


def test_a_blend_has_the_shares_of_its_weights(arguments, tmp_path):
    write_dataset(tmp_path / "other", 100)
    arguments.data_path = ["1", str(tmp_path / "data"), "3", str(tmp_path / "other")]
    before = tokens(arguments)
    assert torch.equal(tokens(arguments), before)
    assert 0.5 < (before >= 1000).double().mean() < 0.8
