"""`maskllm export`: a Megatron checkpoint to a Hugging Face checkpoint that plain transformers loads."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from tqdm import tqdm

from maskllm.checkpoints.reading import Checkpoint, resolve
from maskllm.checkpoints.torch_dist import LazyTensor
from maskllm.dtypes import dtype_name
from maskllm.errors import MaskLLMError
from maskllm.export.mask_file import write_mask_file
from maskllm.families.mapping import Mapping
from maskllm.families.registry import parameter_map
from maskllm.files import atomic_directory, naming, read_json_object, write_json
from maskllm.huggingface.directory import read_side_files, write_side_files
from maskllm.huggingface.tensors import INDEX
from maskllm.ops import check_mask
from maskllm.patterns import unpack_mask

MAX_SHARD_SIZE = "5GB"
"""The default of huggingface_hub's own writer; one file of at most this size is in memory at a time."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, in elements and bytes; the zeros are those inside of the pruned matrices."""

    parameters: int
    pruned_parameters: int
    zeros: int
    bytes: int


def export(
    load: str | Path, output: str | Path, *, mask_file: str | Path | None = None, max_shard_size: str = MAX_SHARD_SIZE
) -> ExportReport:
    """Write the checkpoint `load`, dense or trimmed, as a Hugging Face checkpoint to the directory `output`.

    Tensors keep their dtype and their bits. `output` appears when it is complete and every pruned matrix has been found to have at
    most N non-zeros in every M. `mask_file`, apart from `output`, gets the masks (`maskllm.export.mask_file`) just before. `max_shard_size`
    is a positive number with a unit, such as "5GB". Raises MaskLLMError where `output` exists and is not empty, for checkpoints of
    other stages, for missing or misshapen tensors, and for a weight outside of its mask. Returns what was written.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise MaskLLMError(f"--output {output} exists and is not an empty directory; remove it or name another")
    if mask_file is not None and Path(os.path.realpath(mask_file)).is_relative_to(os.path.realpath(output)):
        raise MaskLLMError(f"--mask-file {mask_file}: lies in --output {output}; name a place apart from it")
    if not re.fullmatch(r"(?=.*[1-9])[0-9]{1,9}(\.[0-9]{1,9})?\s*[KMGT]B", max_shard_size.strip(), re.IGNORECASE):
        raise MaskLLMError(
            f"--max-shard-size {max_shard_size}: wanted a positive size in KB, MB, GB or TB, such as {MAX_SHARD_SIZE}"
        )
    checkpoint = resolve(load)
    if checkpoint.info.stage not in ("dense", "trimmed"):
        raise MaskLLMError(
            f"{checkpoint.path}: is a {checkpoint.info.stage} checkpoint; write its masks into the weights first, with `maskllm trim`"
        )
    if mask_file is not None and checkpoint.info.stage == "dense":
        raise MaskLLMError(f"{checkpoint.path}: is a dense checkpoint, which has no masks for {mask_file}")
    checkpoint.check_weights()
    tensors = _hf_tensors(checkpoint)
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    total = shards.metadata["total_size"]
    pruned = _pruned_names(checkpoint)
    zeros = 0
    with (
        atomic_directory(output) as temporary,
        tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None) as progress,
    ):
        _write_side_files(checkpoint, temporary, {tensor.dtype for tensor in tensors.values()})
        for file, names in shards.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = tensors[name].load().contiguous()
                zeros += int((shard[name] == 0).sum()) if name in pruned else 0
                progress.update(tensors[name].nbytes)
            with naming(output / file):
                save_file(shard, temporary / file, metadata={"format": "pt"})
        if shards.is_sharded:
            write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": shards.tensor_to_filename})
        if mask_file is not None:  # before `output` appears, so that whoever finds that has both
            write_mask_file(mask_file, _hf_masks(checkpoint))
    sizes = {name: torch.Size(tensor.shape).numel() for name, tensor in tensors.items()}
    return ExportReport(sum(sizes.values()), sum(sizes[name] for name in pruned), zeros, total)


def _pruned_names(checkpoint: Checkpoint) -> set[str]:
    """The Hugging Face names of the weights that have masks."""
    if checkpoint.info.stage == "dense":
        return set()
    return {name for mapping in parameter_map(checkpoint.model_config) if mapping.linear is not None for name in mapping.hf}


def _hf_masks(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Each pruned weight's Hugging Face name and its mask, bool of that weight's shape, of a checkpoint with `mask_bits`."""
    for mapping in parameter_map(checkpoint.model_config):
        if mapping.linear is not None:
            yield from zip(mapping.hf, mapping.to_hf(_mask(checkpoint, mapping), checkpoint.model_config), strict=True)


def _mask(checkpoint: Checkpoint, mapping: Mapping) -> torch.Tensor:
    rows, columns = mapping.megatron_shape(checkpoint.model_config)
    key = f"{mapping.linear}.mask_bits"
    checkpoint.check_shape(key, (rows, -(-columns // 8)))
    return unpack_mask(checkpoint.tensors[key].load(), columns)


def _hf_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The model's tensors under their Hugging Face names. Those of one fused tensor follow each other and share one reading."""
    config = checkpoint.model_config
    parts = functools.lru_cache(maxsize=1)(functools.partial(_checked_parts, checkpoint))
    return {
        name: LazyTensor(shape, checkpoint.tensors[mapping.megatron].dtype, functools.partial(_part, parts, mapping, index))
        for mapping in parameter_map(config)
        for index, (name, shape) in enumerate(zip(mapping.hf, mapping.hf_shapes(config), strict=True))
    }


def _part(parts: Callable[[Mapping], list[torch.Tensor]], mapping: Mapping, index: int) -> torch.Tensor:
    return parts(mapping)[index].clone()  # a view would keep the fused tensor in memory, and safetensors refuses shared storage


def _checked_parts(checkpoint: Checkpoint, mapping: Mapping) -> list[torch.Tensor]:
    """The Hugging Face tensors of one Megatron tensor, found to respect their masks where there are any."""
    config = checkpoint.model_config
    weights = mapping.split(checkpoint.tensors[mapping.megatron].load(), config)
    if mapping.linear is None or checkpoint.info.stage == "dense":
        return mapping.transpose(weights)
    pattern = checkpoint.info.block_pattern
    # Blocks run along a matrix's inputs, so it is checked as [out, in], also where it is stored [in, out].
    for name, weight, mask in zip(mapping.hf, weights, mapping.split(_mask(checkpoint, mapping), config), strict=True):
        kept = weight != 0
        if pattern is not None:
            check_mask(kept, pattern, name)
        outside = int((kept & ~mask).sum())
        if outside:
            raise MaskLLMError(f"{checkpoint.path}: {name} has {outside} non-zero weights that its mask removes; trim it again")
    return mapping.transpose(weights)


def _write_side_files(checkpoint: Checkpoint, directory: Path, dtypes: set[torch.dtype]) -> None:
    """The original's files, with the dtype in config.json set to the tensors' where that is one and differs."""
    write_side_files(read_side_files(checkpoint.hf_directory), directory)
    path = directory / "config.json"
    config = read_json_object(path)
    stated = [key for key in ("dtype", "torch_dtype") if key in config]
    actual = dtype_name(dtypes.pop()) if len(dtypes) == 1 else None
    if actual is not None and any(config[key] != actual for key in stated):
        write_json(path, config | dict.fromkeys(stated, actual))
