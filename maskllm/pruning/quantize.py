"""Kept weights to integers with calibration data: SparseGPT's sweep with the mask given (arXiv 2301.00774, section 3.5).

The paper rounds in the sweep that prunes: a column's kept weights go to the grid, and the later columns make up for the error of
rounding and removing alike. Here the mask is given, and every grid is chosen before the sweep. So the columns may come in any order:
those with the largest inputs come first, while many others can make up for them ("act order" of GPTQ's program).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from maskllm.ops import sparse_reference as reference
from maskllm.ops.sparse_linear import Layout
from maskllm.pruning.solve import output_norm
from maskllm.pruning.sparsegpt import BLOCK_SIZE, HessianFactor, factor_hessian
from maskllm.pruning.statistics import InputStatistics

logger = logging.getLogger(__name__)

_SHRINKAGE = torch.linspace(1, 0.5, 26)
"""The scales that are tried, as shares of the one with which a group's largest weight becomes the largest integer."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix whose weights are multiples of scales.

    The errors in the report are ||(W - W_hat) X|| / ||W X|| over the calibration tokens: of the result, and of rounding to the nearest.
    """

    weight: torch.Tensor
    """fp32 [out, in]: integers times scales, 0 for removed weights."""
    scales: torch.Tensor
    """fp32 [out, groups]"""
    report: dict[str, Any]
    """JSON values."""


@torch.no_grad()
def quantize_matrices(
    weights: Mapping[str, torch.Tensor], statistics: InputStatistics, layouts: Mapping[str, Layout]
) -> dict[str, QuantizedMatrix]:
    """Quantize `weights` (name -> [out, in], each of any float dtype), which all have the inputs of `statistics`.

    Their zeros stay. The matrices share one factorization of the Hessian. Raises MaskLLMError as `factor_hessian` does.
    """
    first, hessian = next(iter(weights)), statistics.hessian()
    if statistics.tokens == 0:
        logger.warning("%s: no calibration token reaches them; all inputs get the same weight", ", ".join(weights))
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = factor_hessian(hessian[order][:, order], first)
    found = {}
    for name, weight in weights.items():
        weight, layout = weight.float(), layouts[name]
        scales = group_scales(weight, hessian.diagonal(), layout.bits, layout.group_size)
        grid = reference.each_column(scales, weight.shape[1], layout.group_size)
        quantized = torch.empty_like(weight)
        quantized[:, order] = sweep(weight[:, order], factor, grid[:, order], reference.LARGEST[layout.bits])
        plain = reference.scales_of(weight, layout.bits, layout.group_size)
        nearest = dequantized(reference.quantize(weight, plain, layout.bits, layout.group_size), plain, layout.group_size)
        whole = output_norm(weight, hessian)
        errors = {
            key: (output_norm(weight - other, hessian) / whole).item()
            for key, other in (("relative_error", quantized), ("nearest_error", nearest))
        }
        found[name] = QuantizedMatrix(quantized, scales, {key: None if error != error else error for key, error in errors.items()})
    return found


def group_scales(weight: torch.Tensor, importance: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """The scale of each group, fp32 [out, groups]: of _SHRINKAGE the one with the least squared error of rounding to the nearest.

    Args:
        weight: fp32 [out, in].
        importance: fp32 [in], the weight of a column's squared error: the diagonal of the Hessian.
    """
    largest = reference.scales_of(weight, bits, group_size)
    best, least = largest, None
    for share in _SHRINKAGE.tolist():
        scales = largest * share
        error = weight - dequantized(reference.quantize(weight, scales, bits, group_size), scales, group_size)
        error = _sum_of_groups(error.square_().mul_(importance), group_size)
        if least is None:
            least = error
        else:
            best = torch.where(error < least, scales, best)
            least = torch.minimum(error, least)
    return best


def dequantized(integers: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """Integers times scales, fp32 [out, in]."""
    return integers.float() * reference.each_column(scales, integers.shape[1], group_size)


def _sum_of_groups(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """The sums of `values` [out, in] over the columns of each group, [out, groups]."""
    if group_size == -1:
        return values.sum(1, keepdim=True)
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % group_size))
    return padded.unflatten(1, (-1, group_size)).sum(-1)


def sweep(weight: torch.Tensor, factor: HessianFactor, grid: torch.Tensor, largest: int) -> torch.Tensor:
    """Round the non-zeros of `weight`, fp32 [out, in], from left to right; returns integers of at most `largest` times `grid`, [out, in].

    With the columns before j fixed, the best values of the others follow from `factor`. Column j is fixed at its rounded value, or at
    0 where the weight is removed, and the columns after it move by -(w_j - w_hat_j) / upper_jj * upper_j: algorithm 1 of the paper.

    Args:
        factor: of the Hessian in the order of the columns.
        grid: fp32 [out, in], the scale of each weight.
    """
    # Work on the transpose, so that a column is contiguous.
    columns = weight.t().clone(memory_format=torch.contiguous_format)
    grid = grid.t().contiguous()
    kept = columns != 0
    result = torch.empty_like(columns)
    for start in range(0, len(columns), BLOCK_SIZE):
        end = min(start + BLOCK_SIZE, len(columns))
        errors = torch.empty_like(columns[start:end])
        for column in range(start, end):
            rounded = (columns[column] / grid[column]).round_().clamp_(-largest, largest).mul_(grid[column])
            torch.mul(rounded, kept[column], out=result[column])
            torch.div(columns[column] - result[column], factor.upper[column, column], out=errors[column - start])
            columns[column + 1 : end].addr_(factor.upper[column, column + 1 : end], errors[column - start], alpha=-1)
        columns[end:].addmm_(factor.upper[start:end, end:].t(), errors, alpha=-1)
    return result.t()
