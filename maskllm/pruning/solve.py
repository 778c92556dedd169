"""Prune the matrices of a layer that have the same input."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from maskllm.errors import MaskLLMError
from maskllm.huggingface.mask_file import MaskFile
from maskllm.masking.selection import Sparsity, check_sparsity
from maskllm.patterns import Pattern
from maskllm.pruning.least_squares import least_squares
from maskllm.pruning.magnitude import magnitude_mask
from maskllm.pruning.sparsegpt import DAMPING, factor_hessian, sparsegpt
from maskllm.pruning.statistics import InputStatistics
from maskllm.pruning.wanda import wanda_mask

logger = logging.getLogger(__name__)

METHODS = ("magnitude", "wanda", "sparsegpt")
"""The methods that choose a mask by a score."""

MASK_FILE = "mask-file"
"""The method that takes the masks of a mask file."""


@dataclass(frozen=True)
class PruneSettings:
    """How to prune. Raises MaskLLMError if the values are invalid or do not fit together."""

    method: str = "sparsegpt"
    """One of METHODS, or MASK_FILE."""
    sparsity: Sparsity = Pattern(2, 4)
    """An N:M pattern, or the share of weights to remove."""
    update_weights: bool = False
    """Keep SparseGPT's updated weights."""
    least_squares: bool = False
    """Keep the least-squares weights of the mask, whatever method chose it."""
    sequential: bool = True
    """Calibrate a layer on the outputs of the pruned layers before it; otherwise on the dense model's."""
    damping: float = DAMPING
    """Damping of SparseGPT and of least squares, as a share of the Hessian's mean diagonal."""
    mask_file: MaskFile | None = None
    """The masks of the method MASK_FILE."""
    zeros_stay: bool = False
    """SparseGPT removes weights that are zero first, whatever it adds to them: for a model that has been pruned less before."""

    def __post_init__(self) -> None:
        if self.method not in (*METHODS, MASK_FILE):
            raise MaskLLMError(f"prune method {self.method!r}: wanted one of {', '.join((*METHODS, MASK_FILE))}")
        if (self.method == MASK_FILE) != (self.mask_file is not None):
            raise MaskLLMError(
                f"method {self.method} with mask file {self.mask_file}: {MASK_FILE} needs one, no other method takes one"
            )
        if self.method == MASK_FILE and not isinstance(self.sparsity, Pattern):
            raise MaskLLMError(f"sparsity {self.sparsity}: method {MASK_FILE} wants the file's pattern N:M")
        if self.update_weights and self.method != "sparsegpt":
            raise MaskLLMError(
                f"method {self.method} chooses a mask only; updating the weights needs sparsegpt, or least squares with any method"
            )
        if self.update_weights and self.least_squares:
            raise MaskLLMError("SparseGPT's updated weights and least-squares weights: wanted one of them")
        if not 0 < self.damping < math.inf:
            raise MaskLLMError(f"damping {self.damping}: wanted a positive number")
        check_sparsity(self.sparsity)

    @property
    def changes_weights(self) -> bool:
        """Whether the kept weights get new values."""
        return self.update_weights or self.least_squares

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["sparsity"] = str(self.sparsity) if isinstance(self.sparsity, Pattern) else self.sparsity
        file = values.pop("mask_file")
        for name in ("zeros_stay", "least_squares"):
            if not values[name]:
                del values[name]
        return values if file is None else {**values, "mask_file": {"name": file.path.name, "sha256": file.digest}}


@dataclass(frozen=True)
class PrunedMatrix:
    """A pruned matrix.

    `relative_error` in the report is ||(W - W_hat) X|| / ||W X|| over the calibration tokens.
    """

    mask: torch.Tensor
    """bool [out, in]"""
    weight: torch.Tensor | None
    """The updated weight [out, in] in its stored dtype, 0 for removed weights. None if the kept weights do not change."""
    report: dict[str, Any]
    """JSON values: errors and counts."""

    def apply(self, weight: torch.Tensor) -> None:
        """Overwrite `weight` [out, in], on any device, with the sparse weight."""
        if self.weight is not None:
            weight.copy_(self.weight)
        weight.masked_fill_(~self.mask.to(weight.device), 0)


@torch.no_grad()
def prune_matrices(
    weights: dict[str, torch.Tensor],
    statistics: InputStatistics,
    settings: PruneSettings,
    given: dict[str, torch.Tensor] | None = None,
) -> dict[str, PrunedMatrix]:
    """Prune `weights` (name -> [out, in], each of any float dtype), which all have the inputs of `statistics`.

    `given` are the masks, bool [out, in], if the method is MASK_FILE. The matrices share one factorization of the Hessian. Each
    updated weight is rounded once, to the dtype of its matrix. Raises MaskLLMError if a weight is not finite, before or after, or the
    pattern does not fit.
    """
    first = next(iter(weights))
    for name, weight in weights.items():
        check_matrix(weight, name, settings.sparsity)
    dead = int((statistics.gram.diagonal() == 0).sum())
    note = {"calibration_tokens": statistics.tokens, "skipped_tokens": statistics.skipped_tokens, "dead_inputs": dead}
    if statistics.skipped_tokens:
        logger.warning("%s: skipped %d tokens with non-finite inputs", ", ".join(weights), statistics.skipped_tokens)
    if statistics.samples == 0:
        logger.warning("%s: reached by no calibration sample; all inputs get the same weight", ", ".join(weights))
    elif statistics.tokens == 0:
        logger.warning("%s: no calibration token has finite inputs; all inputs get the same weight", ", ".join(weights))
    elif dead:
        logger.warning("%s: %d of %d inputs are 0 for every token", ", ".join(weights), dead, len(statistics.gram))

    hessian = statistics.hessian()
    if settings.method == "sparsegpt":
        factor = factor_hessian(hessian.clone(), first, damping=settings.damping)
        note["damping"] = factor.damping
    if settings.least_squares:
        # Its scale has no effect; near 1 nothing overflows. If all inputs are 0, the weights stay as they are.
        damped = hessian / hessian.diagonal().mean().clamp(min=torch.finfo(hessian.dtype).tiny)
        damped.diagonal().add_(note.get("damping", settings.damping))

    def solve(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        updated = None
        if settings.method == MASK_FILE:
            mask = torch.cat([given[name] for name in weights])
        elif settings.method == "magnitude":
            mask = magnitude_mask(weight, settings.sparsity)
        elif settings.method == "wanda":
            mask = wanda_mask(weight, hessian.diagonal(), settings.sparsity)
        else:
            removed = weight == 0 if settings.zeros_stay else None
            mask, updated = sparsegpt(weight, factor, settings.sparsity, removed)
        if settings.least_squares:
            start = weight if updated is None else torch.where(factor.dead, weight.to(updated.dtype), updated)
            return mask, least_squares(weight, damped, mask, start, first)
        return mask, updated if settings.update_weights else weight * mask

    if isinstance(settings.sparsity, Pattern):
        # Rows are independent, so one sweep serves all matrices. If their dtypes differ, `cat` takes one that holds all values.
        rows = [len(weight) for weight in weights.values()]
        masks, sparse = (tensor.split(rows) for tensor in solve(torch.cat(list(weights.values()))))
        solved = list(zip(masks, sparse, strict=True))
    else:
        solved = [solve(weight) for weight in weights.values()]

    pruned = {}
    for (name, weight), (mask, sparse_weight) in zip(weights.items(), solved, strict=True):
        sparse_weight = sparse_weight.to(weight.dtype)
        if not sparse_weight.isfinite().all():
            raise MaskLLMError(f"{name}: a new weight is too large for {weight.dtype}; convert the model in bf16 or fp32")
        error = output_norm(weight.float() - sparse_weight.float(), hessian) / output_norm(weight.float(), hessian)
        report = {"relative_error": None if error.isnan() else error.item(), "kept": mask.float().mean().item(), **note}
        pruned[name] = PrunedMatrix(mask, sparse_weight if settings.changes_weights else None, report)
    return pruned


def output_norm(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """||weight X|| up to a constant factor: the square root of trace(W H W^T), with `hessian` proportional to X X^T."""
    return ((weight @ hessian) * weight).sum(dtype=torch.float64).clamp(min=0).sqrt()


def check_matrix(weight: torch.Tensor, name: str, sparsity: Sparsity) -> None:
    """Raise MaskLLMError if the pattern does not fit `weight` [out, in], or if the weight contains NaN or infinity."""
    if isinstance(sparsity, Pattern):
        sparsity.check_divides(weight.shape[1], name)
    if not weight.isfinite().all():
        row, column = (~weight.isfinite()).nonzero()[0].tolist()
        raise MaskLLMError(f"{name}: weight [{row}, {column}] is {weight[row, column].item()}; the checkpoint is damaged")
