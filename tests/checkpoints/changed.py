"""Checkpoints that tests write: the tensors of another checkpoint, some of them changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from maskllm.checkpoints.info import CheckpointInfo
from maskllm.checkpoints.reading import Checkpoint
from maskllm.checkpoints.torch_dist import LazyTensor
from maskllm.checkpoints.writing import write_checkpoint


def lazy(tensor: torch.Tensor) -> LazyTensor:
    """A tensor in memory, as the writer takes it."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_changed(
    source: Checkpoint, root: Path, changes: Mapping[str, torch.Tensor | None], info: CheckpointInfo | None = None
) -> Path:
    """Write `source` to ROOT/release with the tensors `changes` added or replaced, or left out if None; returns ROOT/release."""
    tensors = {key: tensor for key, tensor in source.tensors.items() if key not in changes}
    tensors |= {key: lazy(tensor) for key, tensor in changes.items() if tensor is not None}
    return write_checkpoint(root, tensors, info or source.info, hf_files_from=source.hf_directory, description="")
