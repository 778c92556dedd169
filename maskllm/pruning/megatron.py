"""`maskllm prune`: copy a Megatron checkpoint and add a one-shot mask to every masked weight."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from maskllm.checkpoints.finding import iteration_name
from maskllm.checkpoints.info import UNSTRUCTURED, CheckpointInfo
from maskllm.checkpoints.reading import Checkpoint, resolve
from maskllm.checkpoints.torch_dist import LazyTensor
from maskllm.checkpoints.writing import release_directory, write_checkpoint
from maskllm.distributed import device
from maskllm.errors import MaskLLMError
from maskllm.families.mapping import Mapping
from maskllm.families.model_config import ModelConfig
from maskllm.families.registry import parameter_map
from maskllm.masking.selection import check_keeps
from maskllm.patterns import Pattern, pack_mask
from maskllm.pruning.calibration import Calibration
from maskllm.pruning.layerwise import prune_layers
from maskllm.pruning.magnitude import magnitude_mask
from maskllm.pruning.solve import PruneSettings, check_matrix
from maskllm.pruning.store import DirectoryStore
from maskllm.pruning.stream import LayerStream


def open_for_pruning(load: str | Path, output: str | Path, settings: PruneSettings) -> Checkpoint:
    """Open the checkpoint `load`, and check it, the settings and `output` before any work.

    Raises MaskLLMError if the checkpoint already has masks, a tensor does not have its config's shape, the pattern or the mask file does
    not fit, or `output` cannot be written (`release_directory`).
    """
    checkpoint = resolve(load)
    if checkpoint.info.stage != "dense":
        raise MaskLLMError(
            f"{checkpoint.path}: is a {checkpoint.info.stage} checkpoint; wanted a dense one, as `maskllm convert` writes"
        )
    if Path(output).resolve() in (checkpoint.path.resolve(), checkpoint.path.resolve().parent):
        raise MaskLLMError(f"--output {output} is the checkpoint that is loaded; name another directory")
    release_directory(output, "pruned")
    checkpoint.check_weights()
    for mapping in parameter_map(checkpoint.model_config):
        if mapping.linear is not None and isinstance(settings.sparsity, Pattern):
            settings.sparsity.check_divides(checkpoint.tensors[mapping.megatron].shape[1], mapping.megatron)
    if settings.mask_file is not None:
        _check_mask_file(settings, checkpoint.model_config)
    return checkpoint


def _check_mask_file(settings: PruneSettings, config: ModelConfig) -> None:
    masked = [mapping for mapping in parameter_map(config) if mapping.linear is not None]
    settings.mask_file.check(
        {name: shape for mapping in masked for name, shape in zip(mapping.hf, mapping.hf_shapes(config), strict=True)}
    )
    for mapping in masked:
        for name, mask in zip(mapping.hf, _given_masks(settings, mapping, config), strict=True):
            check_keeps(mask, settings.sparsity, f"{settings.mask_file.path}: {name}")


def _given_masks(settings: PruneSettings, mapping: Mapping, config: ModelConfig) -> list[torch.Tensor]:
    """The masks in the settings' file of the Hugging Face tensors of `mapping`, bool [out, in]."""
    shapes = mapping.hf_shapes(config)
    return mapping.transpose([settings.mask_file.mask(name, shape) for name, shape in zip(mapping.hf, shapes, strict=True)])


def prune_without_data(load: str | Path, output: str | Path, settings: PruneSettings) -> Path:
    """Write the dense checkpoint `load` to OUTPUT/release with masks by magnitude or of a mask file; returns that directory.

    It holds one tensor in memory at a time and builds no model. Raises MaskLLMError as `open_for_pruning` does, and if a weight is
    not finite.
    """
    checkpoint = open_for_pruning(load, output, settings)

    def bits(mapping: Mapping) -> torch.Tensor:
        # A share applies to each Hugging Face matrix, as in `prune_hf`, not to Megatron's fused matrix.
        config = checkpoint.model_config
        parts = mapping.split(checkpoint.tensors[mapping.megatron].load(), config)
        for name, part in zip(mapping.hf, parts, strict=True):
            check_matrix(part, name, settings.sparsity)
        if settings.mask_file is not None:
            masks = _given_masks(settings, mapping, config)
        else:
            masks = [magnitude_mask(part, settings.sparsity) for part in parts]
        return mapping.fuse([pack_mask(mask) for mask in masks], config)

    return write_pruned(checkpoint, output, settings, bits)


def prune_calibrated(
    load: str | Path, output: str | Path, settings: PruneSettings, calibration: Calibration
) -> tuple[Path, dict[str, Any]]:
    """Write the dense checkpoint `load` to OUTPUT/release with masks chosen on calibration data, using all ranks of the job.

    Call it inside of `maskllm.megatron.process_groups.parallel_processes`. The ranks share the file system of `output`, and each
    uses its `maskllm.distributed.device`. Finished layers are stored next to `output`, so after an interruption the same call
    continues after the last one. Returns the written directory and the report (JSON values). Raises MaskLLMError as
    `open_for_pruning` does, if there are fewer samples than ranks, and if the calibration data or the weights cannot be used.
    """
    checkpoint = open_for_pruning(load, output, settings)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if calibration.samples < ranks:
        raise MaskLLMError(f"--calibration-samples {calibration.samples}: wanted at least one for each of the {ranks} processes")
    config = checkpoint.model_config
    tokens = calibration.tokens(checkpoint.hf_directory, context=config.context, vocabulary=config.vocab_size)
    run = {
        "load": str(checkpoint.path.resolve()),
        "manifest": checkpoint.manifest_digest(),
        "settings": settings.as_dict(),
        "calibration": {**calibration.as_dict(), "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()},
    }
    output = Path(os.path.realpath(output))  # "." has no name
    store = DirectoryStore(output.with_name(f".{output.name}.layers"), run)
    stream = LayerStream(checkpoint, device(), calibration.params_dtype)
    hidden = stream.first_hidden(tokens[rank::ranks])
    layers = prune_layers(
        stream, checkpoint.model_config.num_layers, hidden, settings, store=store, group=dist.group.WORLD if ranks > 1 else None
    )
    report = {"load": str(load), **settings.as_dict(), "calibration": calibration.as_dict(), "layers": layers}

    def stored(kind: str, mapping: Mapping) -> torch.Tensor:
        layer = int(re.search(r"\.layers\.(\d+)\.", mapping.megatron)[1])
        parts = [store.tensor(layer, f"{name.removesuffix('.weight')}.{kind}") for name in mapping.hf]
        return mapping.fuse(parts, checkpoint.model_config)

    path = output / iteration_name("release")
    if rank == 0:
        errors = [m["relative_error"] for layer in layers for m in layer["matrices"].values() if m["relative_error"] is not None]
        details = {
            "update_weights": settings.changes_weights,  # by either way: zeros are written in
            **({"least_squares": True} if settings.least_squares else {}),
            "sequential": settings.sequential,
            "calibration": run["calibration"],
            "mean_relative_error": sum(errors) / len(errors) if errors else None,
        }
        write_pruned(
            checkpoint,
            output,
            settings,
            functools.partial(stored, "mask_bits"),
            weight=functools.partial(stored, "weight") if settings.changes_weights else None,
            details=details,
        )
        store.remove()
    dist.barrier()
    return path, report


def write_pruned(
    checkpoint: Checkpoint,
    output: str | Path,
    settings: PruneSettings,
    bits: Callable[[Mapping], torch.Tensor],
    *,
    weight: Callable[[Mapping], torch.Tensor] | None = None,
    details: dict[str, Any] | None = None,
) -> Path:
    """Write OUTPUT/release: the checkpoint's tensors, and for every masked weight the mask bits that `bits` returns for its
    mapping.

    The weights stay dense and unchanged, unless `weight` returns new ones. `details` are added to the checkpoint's info.
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
    made_of = {"mask_file": settings.as_dict()["mask_file"]} if settings.mask_file is not None else {}
    info = CheckpointInfo(
        stage="pruned",
        source=checkpoint.info.source,
        pattern=str(settings.sparsity) if isinstance(settings.sparsity, Pattern) else UNSTRUCTURED,
        method=settings.method,
        details={**checkpoint.info.details, **made_of, **(details or {})},
    )
    return write_checkpoint(output, tensors, info, hf_files_from=checkpoint.hf_directory, description="write")
