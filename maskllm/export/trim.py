"""`maskllm trim`: write learned or one-shot masks into the weights as zeros, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from maskllm.checkpoints.reading import Checkpoint, resolve
from maskllm.checkpoints.torch_dist import LazyTensor
from maskllm.checkpoints.writing import write_checkpoint
from maskllm.dtypes import BY_NAME
from maskllm.errors import MaskLLMError
from maskllm.families.registry import num_parameters, parameter_map
from maskllm.masking.scaling import group_boundary, scaled
from maskllm.masking.selection import keep_of_each_block
from maskllm.ops import winner_mask
from maskllm.patterns import Pattern, pack_mask, unpack_mask


@dataclass(frozen=True)
class TrimReport:
    """What was written, in elements and bytes."""

    path: str
    """The iteration directory."""
    trimmed_from: str
    """The stage of the checkpoint that was read."""
    pattern: str
    parameters: int
    pruned_parameters: int
    """The weights of the masked linears."""
    zeros: int
    """The weights that the masks remove."""
    blocks: int | None
    """Blocks of M weights, N of them kept; None for masks that follow no pattern."""
    bytes: int
    """Size of the weights and the mask bits."""
    trained_weights: bool
    """Whether the weights were trained, so that masks alone do not make this model of the original."""
    steps_done: int | None
    """The run's optimizer steps up to this checkpoint; None if it is not a run's."""
    steps_planned: int | None
    """The run's `--train-iters`; None if the checkpoint does not say it."""

    @property
    def is_unfinished(self) -> bool:
        """Whether the run had steps left, so that its masks and weights were not its last ones."""
        return self.steps_done is not None and self.steps_planned is not None and self.steps_done < self.steps_planned


def trim(load: str | Path, output: str | Path) -> TrimReport:
    """Write the checkpoint `load`, trained or pruned, to OUTPUT/release with its final masks applied to the weights.

    Removed weights become zero. Kept weights keep their bits; if they were trained, they are the fp32 masters, rounded once to the dtype
    that they had before. Each mask is stored beside its weight as `mask_bits`. Logits, optimizer state and training state are left out.
    The final mask of a trained block is the candidate with the largest logit, the lowest index of equals. The final masks of a pruned
    checkpoint, and of a run that trained the weights alone, are the fixed ones. Those of CAST keep the largest weights of each block; its
    scales are multiplied into the masters before these are rounded. Raises MaskLLMError if the checkpoint is of another
    stage, or if a tensor is missing or has another shape than the config asks for.
    """
    checkpoint = resolve(load)
    if checkpoint.info.stage not in ("trained", "pruned"):
        advice = {"dense": "give it masks first, with `maskllm prune` or training", "trimmed": "there is nothing left to trim"}
        raise MaskLLMError(f"{checkpoint.path}: is a {checkpoint.info.stage} checkpoint; {advice[checkpoint.info.stage]}")
    if Path(output).resolve() in (checkpoint.path.resolve(), checkpoint.path.resolve().parent):
        raise MaskLLMError(f"--output {output} is the checkpoint that is loaded; name another directory")
    checkpoint.check_weights()
    mask = functools.lru_cache(maxsize=1)(functools.partial(_mask, checkpoint))
    removed: dict[str, int] = {}
    pruned_parameters = 0
    tensors: dict[str, LazyTensor] = {}
    for mapping in parameter_map(checkpoint.model_config):
        weight = _final_weight(checkpoint, mapping.megatron, mapping.linear)
        if mapping.linear is None:
            tensors[mapping.megatron] = weight
            continue
        tensors[mapping.megatron] = dataclasses.replace(
            weight, load=functools.partial(_zeroed, weight, mask, mapping.linear, removed)
        )
        pruned_parameters += torch.Size(weight.shape).numel()
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
    path = write_checkpoint(output, tensors, info, hf_files_from=checkpoint.hf_directory, description="trim")
    pattern = checkpoint.info.block_pattern
    steps_done, steps_planned = _steps(checkpoint)
    return TrimReport(
        path=str(path),
        trimmed_from=checkpoint.info.stage,
        pattern=checkpoint.info.pattern,
        parameters=num_parameters(checkpoint.model_config),
        pruned_parameters=pruned_parameters,
        zeros=sum(removed.values()),
        blocks=pruned_parameters // pattern.m if pattern is not None else None,
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        trained_weights=checkpoint.info.weights_dtype is not None,
        steps_done=steps_done,
        steps_planned=steps_planned,
    )


def _steps(checkpoint: Checkpoint) -> tuple[int | None, int | None]:
    """How many steps the run that wrote a checkpoint had done and had planned; None for what it does not say."""
    if checkpoint.info.stage != "trained":
        return None, None
    settings = checkpoint.info.details.get("settings")
    planned = settings.get("train_iters") if isinstance(settings, dict) else None
    return checkpoint.iteration, planned


def _final_weight(checkpoint: Checkpoint, key: str, linear: str | None) -> LazyTensor:
    """The tensor `key`, which may be the weight of `linear`; if it was trained, its fp32 master times the scales that it may have, rounded
    once, to the dtype that it had before."""
    stored = checkpoint.tensors[key]
    before = checkpoint.info.weights_dtype
    if before is None:
        return stored
    scales = checkpoint.tensors[f"{linear}.weight_scales"] if linear is not None and checkpoint.has_weight_scales else None
    # Megatron's names for masters: those of its mixed-precision optimizer, and those of its distributed one.
    masters = (f"optimizer.state.{name}.{key}" for name in ("fp32_param", "param"))
    source = next((checkpoint.tensors[name] for name in masters if name in checkpoint.tensors), stored)
    dtype = BY_NAME[before if isinstance(before, str) else before[key]]

    def load() -> torch.Tensor:
        weight = source.load()
        if scales is not None:
            boundary = group_boundary(weight.shape[1], checkpoint.info.block_pattern.m)
            weight = scaled(weight.float(), scales.load(), boundary)
        return weight.to(dtype)

    return LazyTensor(stored.shape, dtype, load)


def _mask_source(checkpoint: Checkpoint, linear: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The key and the shape of the tensor that holds the mask, its logits or its magnitudes, of a weight [out, in] with shape `shape`."""
    rows, columns = shape
    if checkpoint.has_weight_scales:
        return f"{linear}.weight", shape
    if not checkpoint.has_mask_logits:
        return f"{linear}.mask_bits", (rows, -(-columns // 8))
    pattern = _learned_pattern(checkpoint)
    return f"{linear}.mask_logits", (rows, columns // pattern.m, pattern.num_candidates)


def _learned_pattern(checkpoint: Checkpoint) -> Pattern:
    pattern = checkpoint.info.block_pattern
    if pattern is None:
        raise MaskLLMError(f"{checkpoint.path}: is a trained checkpoint with pattern {checkpoint.info.pattern}; wanted N:M")
    return pattern


def _mask(checkpoint: Checkpoint, linear: str) -> torch.Tensor:
    """The final mask of the linear `linear`, bool [out, in]."""
    shape = checkpoint.tensors[f"{linear}.weight"].shape
    source = checkpoint.tensors[_mask_source(checkpoint, linear, shape)[0]].load()
    if checkpoint.has_weight_scales:
        return keep_of_each_block(source.abs(), checkpoint.info.block_pattern)
    if not checkpoint.has_mask_logits:
        return unpack_mask(source, shape[1])
    try:
        return winner_mask(source, _learned_pattern(checkpoint))
    except MaskLLMError as error:
        raise MaskLLMError(f"{checkpoint.path}: {linear}: {error}") from None


def _zeroed(weight: LazyTensor, mask: Callable[[str], torch.Tensor], linear: str, removed: dict[str, int]) -> torch.Tensor:
    """The weight with zeros written into it. Stores the number of removed weights in `removed[linear]`."""
    out = ~mask(linear)
    removed[linear] = int(out.sum())
    return weight.load().masked_fill_(out, 0)


def _bits(mask: Callable[[str], torch.Tensor], linear: str) -> torch.Tensor:
    return pack_mask(mask(linear))
