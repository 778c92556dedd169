"""A tiny LLaMA 3 and its checkpoint: shared by tests that only read them, copied for each test that damages them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import resolve
from maskllm.megatron.process_groups import parallel_processes
from tests.families.tiny import write_tiny


@pytest.fixture(scope="session")
def llama3_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face directory. Only read it."""
    path = tmp_path_factory.mktemp("llama3") / "hf"
    write_tiny("llama3", path, torch.bfloat16)
    return path


@pytest.fixture(scope="session")
def llama3_dense(llama3_hf: Path) -> Path:
    """The checkpoint directory, with one dense `release`. Only read it."""
    path = llama3_hf.parent / "dense"
    convert(llama3_hf, path)
    return path


@pytest.fixture
def hf(llama3_hf: Path, tmp_path: Path) -> Path:
    """A copy of `llama3_hf` for this test."""
    return shutil.copytree(llama3_hf, tmp_path / "hf")


@pytest.fixture
def dense(llama3_dense: Path, tmp_path: Path) -> Path:
    """A copy of `llama3_dense` for this test."""
    return shutil.copytree(llama3_dense, tmp_path / "dense")


@pytest.fixture
def megatron() -> Iterator[None]:
    """Megatron's process groups, for a model in this process."""
    with parallel_processes():
        yield


def read_everything(root: Path) -> None:
    """Read all that a checkpoint holds. Raises MaskLLMError if anything is missing or damaged."""
    checkpoint = resolve(root)
    checkpoint.check_weights()
    for key in checkpoint.tensors:
        checkpoint.tensors[key].load()


def flip_a_bit(path: Path) -> None:
    """Damage a file in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
