"""`maskllm export`: a Megatron checkpoint to a Hugging Face checkpoint that plain transformers loads."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from maskllm.checkpoints.reading import Checkpoint, resolve
from maskllm.checkpoints.torch_dist import LazyTensor
from maskllm.dtypes import dtype_name
from maskllm.errors import MaskLLMError
from maskllm.families.mapping import Mapping
from maskllm.families.registry import parameter_map
from maskllm.files import atomic_directory, empty_output, read_json_object, write_json
from maskllm.huggingface.mask_file import open_base, write_mask_file
from maskllm.huggingface.shards import MAX_SHARD_SIZE, STORED_NAMES, TensorSpec, write_shards
from maskllm.huggingface.side_files import read_side_files, write_side_files
from maskllm.huggingface.weights_hash import TRAINED, StatedHash, write_hash
from maskllm.ops import check_mask
from maskllm.patterns import unpack_mask


@dataclass(frozen=True)
class ExportReport:
    """What was written, in elements and bytes."""

    parameters: int
    pruned_parameters: int
    """The weights of the pruned matrices."""
    zeros: int
    """Zeros in the pruned matrices."""
    bytes: int
    weights_sha256: str
    """The hash of the weights, which is also in the directory (`maskllm.huggingface.weights_hash`)."""
    trained_weights: bool
    """Whether the weights were trained, so that masks alone do not make this model of the original."""


def export(
    load: str | Path,
    output: str | Path,
    *,
    mask_file: str | Path | None = None,
    mask_base: str | Path | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> ExportReport:
    """Write the checkpoint `load`, dense or trimmed, as a Hugging Face checkpoint to the directory `output`.

    Tensors keep their dtype and their bits. Every pruned matrix is checked: it has at most N non-zeros in every M, and none outside
    of its mask. `output` states the hash of its weights, and whether kept weights were changed (`maskllm.huggingface.weights_hash`).
    It appears complete or not at all.

    Args:
        mask_file: A file outside of `output` to write the masks to (`maskllm.huggingface.mask_file`). It appears before `output` does.
        mask_base: The mask file, or its hub id, that `mask_file` is written as a difference to.
        max_shard_size: The largest size of a safetensors file: a positive number with a unit, such as "5GB".

    Raises MaskLLMError if `output` exists and is not empty, if the checkpoint is of another stage, if a tensor is missing or has a
    wrong shape, and if a matrix fails its check.
    """
    output = empty_output(output)
    if mask_file is not None and Path(os.path.realpath(mask_file)).is_relative_to(os.path.realpath(output)):
        raise MaskLLMError(f"--mask-file {mask_file}: lies in --output {output}; name a file outside of it")
    if not re.fullmatch(r"(?=.*[1-9])[0-9]{1,9}(\.[0-9]{1,9})?\s*[KMGT]B", max_shard_size.strip(), re.IGNORECASE):
        raise MaskLLMError(
            f"--max-shard-size {max_shard_size}: wanted a positive size in KB, MB, GB or TB, such as {MAX_SHARD_SIZE}"
        )
    if mask_base is not None and mask_file is None:
        raise MaskLLMError("--mask-base: says how to write --mask-file; give both, or leave it out")
    checkpoint = resolve(load)
    if checkpoint.info.stage not in ("dense", "trimmed"):
        raise MaskLLMError(
            f"{checkpoint.path}: is a {checkpoint.info.stage} checkpoint; write its masks into the weights first, with "
            "`maskllm trim`"
        )
    if mask_file is not None and checkpoint.info.stage == "dense":
        raise MaskLLMError(f"{checkpoint.path}: is a dense checkpoint, which has no masks for {mask_file}")
    checkpoint.check_weights()
    tensors = _hf_tensors(checkpoint)
    pruned = _pruned_names(checkpoint)
    base = None
    if mask_base is not None:
        base = open_base(mask_base)
        base.check({name: tensors[name].shape for name in pruned})
    plan = {name: TensorSpec(STORED_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    zeros = 0
    with (
        atomic_directory(output, replace=False) as temporary,
        write_shards(temporary, plan, max_shard_size) as writer,
        tqdm(total=writer.total_bytes, unit="B", unit_scale=True, desc="export", disable=None) as progress,
    ):
        _write_side_files(checkpoint, temporary, {tensor.dtype for tensor in tensors.values()})
        for name in tensors:
            tensor = tensors[name].load()
            zeros += int((tensor == 0).sum()) if name in pruned else 0
            writer.write(name, tensor)
            progress.update(tensors[name].nbytes)
        write_hash(temporary, StatedHash(writer.weights_hash.hexdigest(), _kept_weights(checkpoint)))
        if mask_file is not None:  # before `output` appears, so that both exist when `output` does
            write_mask_file(mask_file, _hf_masks(checkpoint), base)
    sizes = {name: torch.Size(tensor.shape).numel() for name, tensor in tensors.items()}
    return ExportReport(
        parameters=sum(sizes.values()),
        pruned_parameters=sum(sizes[name] for name in pruned),
        zeros=zeros,
        bytes=writer.total_bytes,
        weights_sha256=writer.weights_hash.hexdigest(),
        trained_weights=checkpoint.info.weights_dtype is not None,
    )


def _kept_weights(checkpoint: Checkpoint) -> str | None:
    """`StatedHash.kept_weights` of the checkpoint."""
    details = checkpoint.info.details
    if checkpoint.info.weights_dtype is not None:
        return TRAINED
    if details.get("least_squares"):
        return "fitted by least squares"
    return f"updated by {checkpoint.info.method}" if details.get("update_weights") else None


def _pruned_names(checkpoint: Checkpoint) -> set[str]:
    """The Hugging Face names of the weights that have masks."""
    if checkpoint.info.stage == "dense":
        return set()
    return {name for mapping in parameter_map(checkpoint.model_config) if mapping.linear is not None for name in mapping.hf}


def _hf_masks(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Each pruned weight's Hugging Face name and its mask, bool in that weight's shape. The checkpoint must hold `mask_bits`."""
    for mapping in parameter_map(checkpoint.model_config):
        if mapping.linear is not None:
            yield from zip(mapping.hf, mapping.to_hf(_mask(checkpoint, mapping), checkpoint.model_config), strict=True)


def _mask(checkpoint: Checkpoint, mapping: Mapping) -> torch.Tensor:
    """The stored mask of a Megatron weight, bool [out, in]."""
    rows, columns = mapping.megatron_shape(checkpoint.model_config)
    key = f"{mapping.linear}.mask_bits"
    checkpoint.check_shape(key, (rows, -(-columns // 8)))
    return unpack_mask(checkpoint.tensors[key].load(), columns)


def _hf_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The model's tensors by Hugging Face name. The parts of a fused tensor follow each other, so that it is read only once."""
    config = checkpoint.model_config
    parts = functools.lru_cache(maxsize=1)(functools.partial(_checked_parts, checkpoint))
    return {
        name: LazyTensor(shape, checkpoint.tensors[mapping.megatron].dtype, functools.partial(_part, parts, mapping, index))
        for mapping in parameter_map(config)
        for index, (name, shape) in enumerate(zip(mapping.hf, mapping.hf_shapes(config), strict=True))
    }


def _part(parts: Callable[[Mapping], list[torch.Tensor]], mapping: Mapping, index: int) -> torch.Tensor:
    return parts(mapping)[index]


def _checked_parts(checkpoint: Checkpoint, mapping: Mapping) -> list[torch.Tensor]:
    """The Hugging Face tensors of one Megatron tensor. Raises MaskLLMError if a weight breaks its pattern or its mask."""
    config = checkpoint.model_config
    weights = mapping.split(checkpoint.tensors[mapping.megatron].load(), config)
    if mapping.linear is None or checkpoint.info.stage == "dense":
        return mapping.transpose(weights)
    pattern = checkpoint.info.block_pattern
    # Blocks run along a matrix's inputs, so the check takes [out, in], before `transpose`.
    for name, weight, mask in zip(mapping.hf, weights, mapping.split(_mask(checkpoint, mapping), config), strict=True):
        kept = weight != 0
        if pattern is not None:
            check_mask(kept, pattern, name)
        outside = int((kept & ~mask).sum())
        if outside:
            raise MaskLLMError(f"{checkpoint.path}: {name} has {outside} non-zero weights that its mask removes; trim it again")
    return mapping.transpose(weights)


def _write_side_files(checkpoint: Checkpoint, directory: Path, dtypes: set[torch.dtype]) -> None:
    """Write the original's `side_files`. If all tensors have one dtype, config.json states that dtype."""
    write_side_files(read_side_files(checkpoint.hf_directory), directory)
    path = directory / "config.json"
    config = read_json_object(path)
    stated = [key for key in ("dtype", "torch_dtype") if key in config]
    actual = dtype_name(dtypes.pop()) if len(dtypes) == 1 else None
    changed = config | dict.fromkeys(stated if actual is not None else (), actual)
    changed.pop("transformers_weights", None)  # the original's weights have another name
    if changed != config:
        write_json(path, changed)
