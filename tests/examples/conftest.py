"""Fixtures for the tests of the launch scripts."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def pruned(tiny_hf, tiny_dense, tiny_pruned, tiny_dataset, tmp_path) -> dict[str, object]:
    """The settings of a tiny run after the steps before the training."""
    output = tmp_path / "output"
    (output / "tokens").mkdir(parents=True)
    for suffix in (".bin", ".idx"):
        shutil.copy(tiny_dataset + suffix, output / "tokens" / f"c4_00000_text_document{suffix}")
    (output / "dense").symlink_to(tiny_dense)
    (output / "prior").symlink_to(tiny_pruned)
    return {"MODEL": "tiny", "HF_MODEL": tiny_hf, "OUTPUT": output, "SHARDS": 0}
