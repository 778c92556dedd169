"""`maskllm convert`: a Hugging Face checkpoint to a Megatron checkpoint, one tensor in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from maskllm.checkpoints.info import CheckpointInfo
from maskllm.checkpoints.torch_dist import LazyTensor
from maskllm.checkpoints.writing import release_directory, write_checkpoint
from maskllm.errors import MaskLLMError
from maskllm.families.mapping import Mapping
from maskllm.families.model_config import ModelConfig
from maskllm.families.registry import find_stored, is_derived_buffer, num_parameters, parameter_map, read_model_config, tied_copies
from maskllm.files import read_json_object
from maskllm.huggingface.hub import find_source
from maskllm.huggingface.tensors import HFTensors

MAKE_VOCAB_SIZE_DIVISIBLE_BY = 128
"""Megatron-LM's default (`--make-vocab-size-divisible-by`), which suits the kernels of matrix products."""


@dataclass(frozen=True)
class ConvertReport:
    """What was written."""

    path: str
    """The iteration directory."""
    tensors: int
    """Megatron tensors. Some of them hold several Hugging Face tensors."""
    parameters: int
    bytes: int
    """Size of the parameters and of the vocabulary's padding."""


def convert(
    hf: str | Path, output: str | Path, *, make_vocab_size_divisible_by: int = MAKE_VOCAB_SIZE_DIVISIBLE_BY
) -> ConvertReport:
    """Convert the Hugging Face checkpoint `hf`, a directory or a hub id, to the Megatron checkpoint directory `output`.

    Every tensor keeps its dtype and its bits. The embedding and the output matrix get rows of zeros up to a multiple of
    `make_vocab_size_divisible_by`; any tensor-parallel size loads them. The iteration directory is OUTPUT/release.

    Raises MaskLLMError naming the config key if the model is not supported, and naming the tensor if one is missing, unknown or of
    the wrong shape. Raises as `release_directory` does before anything is downloaded.
    """
    release_directory(output, "dense")
    source = find_source(hf)
    config = read_model_config(source / "config.json").padded(make_vocab_size_divisible_by)
    tensors = HFTensors(source)
    stored = find_stored(tensors.names, config)
    _check_names(tensors, stored, config)
    lazy = {mapping.megatron: _converted(mapping, tensors, stored, config) for mapping in parameter_map(config)}
    info = CheckpointInfo(stage="dense", source=str(hf))
    path = write_checkpoint(output, lazy, info, hf_files_from=source, description="convert")
    return ConvertReport(str(path), len(lazy), num_parameters(config), sum(tensor.nbytes for tensor in lazy.values()))


def _converted(mapping: Mapping, tensors: HFTensors, stored: dict[str, str], config: ModelConfig) -> LazyTensor:
    """The Megatron tensor of `mapping`. `stored` are the names of its Hugging Face tensors in the files.

    Raises MaskLLMError if one of them is missing or has a wrong shape, or if they have different dtypes.
    """
    for name, wanted in zip(mapping.hf, mapping.hf_shapes(config), strict=True):
        if name not in stored:
            raise MaskLLMError(f"{tensors.directory}: has no tensor {name}, which a {config.model_type} model with this config has")
        found = tensors.shape(stored[name])
        if found != wanted:
            raise MaskLLMError(
                f"{tensors.directory}: tensor {stored[name]} has shape {list(found)}; the model's config asks for {list(wanted)}"
            )
    names = [stored[name] for name in mapping.hf]
    dtypes = [tensors.dtype(name) for name in names]
    if len(set(dtypes)) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in zip(names, dtypes, strict=True))
        raise MaskLLMError(f"{tensors.directory}: tensors that Megatron fuses must have one dtype; found {listed}")
    return LazyTensor(
        mapping.megatron_shape(config),
        dtypes[0],
        lambda: mapping.to_megatron([tensors.load(name) for name in names], config),
    )


def _check_names(tensors: HFTensors, stored: dict[str, str], config: ModelConfig) -> None:
    """Check that every tensor is converted, is a buffer that the config determines, or equals the tensor that it is tied to.

    Raises MaskLLMError naming the first tensor that is none of these.
    """
    unknown = set(tensors.names) - set(stored.values())
    unknown -= {name for name in unknown if is_derived_buffer(name, config)}
    for copy, original in tied_copies(config).items():
        if copy in unknown and not _equal(tensors, copy, stored[original]):
            raise MaskLLMError(
                f"{tensors.directory}: {copy} differs from {stored[original]}, but the config ties them; set tie_word_embeddings "
                "to false in config.json if the model was trained with a separate output layer"
            )
        unknown.discard(copy)
    if unknown:
        others = f", nor are {len(unknown) - 1} others" if len(unknown) > 1 else ""
        architectures = read_json_object(tensors.directory / "config.json").get("architectures")
        raise MaskLLMError(
            f"{tensors.directory}: tensor {min(unknown)} is not part of a {config.model_type} language model with this config{others}; "
            f"its architectures are {architectures}"
        )


def _equal(tensors: HFTensors, one: str, other: str) -> bool:
    same_kind = (tensors.shape(one), tensors.dtype(one)) == (tensors.shape(other), tensors.dtype(other))
    return same_kind and torch.equal(tensors.load(one), tensors.load(other))
