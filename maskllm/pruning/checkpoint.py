"""`maskllm prune`: a Megatron checkpoint to the same checkpoint with a one-shot mask beside every masked weight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from maskllm.errors import MaskLLMError
from maskllm.models.checkpoint import Checkpoint, CheckpointInfo, resolve, write_checkpoint
from maskllm.models.families import parameter_map
from maskllm.models.mapping import Mapping
from maskllm.models.torch_dist import LazyTensor
from maskllm.patterns import Pattern, pack_mask
from maskllm.pruning.magnitude import magnitude_mask
from maskllm.pruning.solve import PruneSettings, check_matrix

UNSTRUCTURED = "unstructured"
"""The pattern in the info of a checkpoint whose masks follow none."""


def open_for_pruning(load: str | Path, output: str | Path, settings: PruneSettings) -> Checkpoint:
    """The checkpoint `load`, with its shapes and those of its masks checked before any work is done.

    Raises MaskLLMError where it has masks already, a tensor has another shape than its config says, or the pattern does not fit.
    """
    checkpoint = resolve(load)
    if checkpoint.info.stage != "dense":
        raise MaskLLMError(
            f"{checkpoint.path}: is a {checkpoint.info.stage} checkpoint; wanted a dense one, as `maskllm convert` writes"
        )
    if Path(output).resolve() in (checkpoint.path.resolve(), checkpoint.path.resolve().parent):
        raise MaskLLMError(f"--output {output} is the checkpoint that is loaded; name another directory")
    checkpoint.check_weights()
    for mapping in parameter_map(checkpoint.model_config):
        if mapping.linear is not None and isinstance(settings.sparsity, Pattern):
            settings.sparsity.check_divides(checkpoint.tensors[mapping.megatron].shape[1], mapping.megatron)
    return checkpoint


def prune_by_magnitude(load: str | Path, output: str | Path, settings: PruneSettings) -> Path:
    """Write the dense checkpoint `load` to OUTPUT/release with magnitude masks; returns that directory.

    One tensor is in memory at a time and no model is built. Raises MaskLLMError as `open_for_pruning` does, and for a weight that is
    not finite.
    """
    checkpoint = open_for_pruning(load, output, settings)

    def bits(mapping: Mapping) -> torch.Tensor:
        # A share is counted over each Hugging Face matrix, as in a model in memory, not over Megatron's fused one.
        config = checkpoint.model_config
        parts = mapping.to_hf(checkpoint.tensors[mapping.megatron].load(), config)
        for name, part in zip(mapping.hf, parts, strict=True):
            check_matrix(part, name, settings.sparsity)
        return mapping.to_megatron([pack_mask(magnitude_mask(part, settings.sparsity)) for part in parts], config)

    return write_pruned(checkpoint, output, settings, bits)


def write_pruned(
    checkpoint: Checkpoint,
    output: str | Path,
    settings: PruneSettings,
    bits: Callable[[Mapping], torch.Tensor],
    *,
    weight: Callable[[Mapping], torch.Tensor] | None = None,
    details: dict[str, Any] | None = None,
) -> Path:
    """Write OUTPUT/release: the checkpoint's tensors and, for every masked weight, the mask bits that `bits` makes for its mapping.

    Weights stay as they are, without zeros, unless `weight` makes others. `details` go into the checkpoint's info.
    """
    tensors: dict[str, LazyTensor] = {}
    for mapping in parameter_map(checkpoint.model_config):
        tensor = checkpoint.tensors[mapping.megatron]
        if mapping.linear is not None:
            rows, columns = tensor.shape
            make = functools.partial(bits, mapping)
            tensors[f"{mapping.linear}.mask_bits"] = LazyTensor((rows, -(-columns // 8)), torch.uint8, make)
            if weight is not None:
                tensor = dataclasses.replace(tensor, load=functools.partial(weight, mapping))
        tensors[mapping.megatron] = tensor
    info = CheckpointInfo(
        stage="pruned",
        source=checkpoint.info.source,
        pattern=str(settings.sparsity) if isinstance(settings.sparsity, Pattern) else UNSTRUCTURED,
        method=settings.method,
        details={**checkpoint.info.details, **(details or {})},
    )
    return write_checkpoint(output, tensors, info, hf_files_from=checkpoint.hf_directory, description="write")
