"""`maskllm trim`: from learned (or one-shot) masks to weights with zeros, one layer in memory at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from maskllm.errors import MaskLLMError
from maskllm.models.checkpoint import Checkpoint, resolve, write_checkpoint
from maskllm.models.families import parameter_map
from maskllm.models.torch_dist import LazyTensor
from maskllm.ops import winner_mask
from maskllm.patterns import Pattern, pack_mask, unpack_mask


def trim(load: str | Path, output: str | Path) -> Path:
    """Write the checkpoint `load`, trained or pruned, to OUTPUT/release with only the winning masks; returns that directory.

    Each masked weight gets zeros where its mask removes it and its kept entries keep their bits; its mask stays beside it as
    `mask_bits`. Logits, optimizer and training state are left out. A trained block's winner is its largest logit (the lowest
    candidate of equals); a pruned checkpoint's masks are its one-shot masks. Raises MaskLLMError for other stages, and where a
    tensor is missing or has another shape than the config asks for.
    """
    checkpoint = resolve(load)
    if checkpoint.info.stage not in ("trained", "pruned"):
        advice = {"dense": "give it masks first, with `maskllm prune` or training", "trimmed": "there is nothing left to trim"}
        raise MaskLLMError(f"{checkpoint.path}: is a {checkpoint.info.stage} checkpoint; {advice[checkpoint.info.stage]}")
    if Path(output).resolve() in (checkpoint.path.resolve(), checkpoint.path.resolve().parent):
        raise MaskLLMError(f"--output {output} is the checkpoint that is loaded; name another directory")
    checkpoint.check_weights()
    mask = functools.lru_cache(maxsize=1)(functools.partial(_mask, checkpoint))
    tensors: dict[str, LazyTensor] = {}
    for mapping in parameter_map(checkpoint.model_config):
        weight = checkpoint.tensors[mapping.megatron]
        if mapping.linear is None:
            tensors[mapping.megatron] = weight
            continue
        tensors[mapping.megatron] = dataclasses.replace(weight, load=functools.partial(_zeroed, weight, mask, mapping.linear))
        checkpoint.check_shape(*_mask_source(checkpoint, mapping.linear, weight.shape))
        rows, columns = weight.shape
        tensors[f"{mapping.linear}.mask_bits"] = LazyTensor(
            (rows, -(-columns // 8)), torch.uint8, functools.partial(_bits, mask, mapping.linear)
        )
    info = dataclasses.replace(
        checkpoint.info,
        stage="trimmed",
        details={**checkpoint.info.details, "trimmed_from": checkpoint.info.stage, "iteration": checkpoint.iteration},
    )
    return write_checkpoint(output, tensors, info, hf_files_from=checkpoint.hf_directory, description="trim")


def _mask_source(checkpoint: Checkpoint, linear: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The key and the shape of the tensor that the mask of a weight [out, in] comes from."""
    rows, columns = shape
    if checkpoint.info.stage == "pruned":
        return f"{linear}.mask_bits", (rows, -(-columns // 8))
    pattern = _learned_pattern(checkpoint)
    return f"{linear}.mask_logits", (rows, columns // pattern.m, pattern.num_candidates)


def _learned_pattern(checkpoint: Checkpoint) -> Pattern:
    pattern = checkpoint.info.block_pattern
    if pattern is None:
        raise MaskLLMError(f"{checkpoint.path}: is a trained checkpoint with pattern {checkpoint.info.pattern}; wanted N:M")
    return pattern


def _mask(checkpoint: Checkpoint, linear: str) -> torch.Tensor:
    """The final mask, bool [out, in], of a masked linear."""
    shape = checkpoint.tensors[f"{linear}.weight"].shape
    source = checkpoint.tensors[_mask_source(checkpoint, linear, shape)[0]].load()
    if checkpoint.info.stage == "pruned":
        return unpack_mask(source, shape[1])
    try:
        return winner_mask(source, _learned_pattern(checkpoint))
    except MaskLLMError as error:
        raise MaskLLMError(f"{checkpoint.path}: {linear}: {error}") from None


def _zeroed(weight: LazyTensor, mask: Callable[[str], torch.Tensor], linear: str) -> torch.Tensor:
    return weight.load().masked_fill_(~mask(linear), 0)


def _bits(mask: Callable[[str], torch.Tensor], linear: str) -> torch.Tensor:
    return pack_mask(mask(linear))
